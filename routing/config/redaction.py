"""What must not be read in a log, an event or a page: values under names that look secret, and passwords in URLs.

The names decide, not the values: a secret that is given without a name, as a positional argument, looks like any text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

#: What stands for a value that is not shown.
HIDDEN: Final = "***"
#: Members of arguments that are looked at: more than the thousand characters of a representation can show.
MOST_MEMBERS: Final = 1000
#: Levels of lists and dicts that are looked into, one more than a representation shows.
LEVELS: Final = 4

_NAME: Final = re.compile(
    r"passw|passphrase|pwd|secret|token|api_?-?key|access_?-?key|private_?-?key|credential|authorization|bearer|cookie",
    re.IGNORECASE,
)
_PLAIN: Final = (str, int, float, type(None))


def looks_secret(name: object) -> bool:
    """Whether a value of this name is not to be shown."""
    return isinstance(name, str) and _NAME.search(name) is not None


def hidden(arguments: Any) -> Any:
    """The arguments as they may be shown: the same object where nothing is to be hidden, else a copy."""
    return _hidden(arguments, LEVELS, [MOST_MEMBERS])


def _hidden(value: Any, levels: int, left: list[int]) -> Any:
    """In the order in which a representation shows the members, so that what is not looked at is not shown either."""
    if isinstance(value, _PLAIN) or not levels or left[0] <= 0:
        return value
    if isinstance(value, Mapping):
        left[0] -= len(value)
        copy = {
            name: HIDDEN if looks_secret(name) else _hidden(member, levels - 1, left) for name, member in value.items()
        }
        return value if all(copy[name] is member for name, member in value.items()) else copy
    if isinstance(value, (list, tuple)):
        members = value[: left[0]]
        left[0] -= len(members)
        shown = [_hidden(member, levels - 1, left) for member in members]
        if all(new is old for new, old in zip(shown, members, strict=True)):
            return value
        return tuple(shown) if isinstance(value, tuple) else shown
    return value


#: Headers in which a producer writes the arguments for people.
SHOWN_HEADERS: Final = ("argsrepr", "kwargsrepr")


def hidden_headers(headers: Mapping[str, Any]) -> dict[str, Any]:
    """A message's headers without what its producer wrote of arguments that look secret."""
    return {name: HIDDEN if name in SHOWN_HEADERS and looks_secret(value) else value for name, value in headers.items()}
