"""Redaction of logs, events and pages: values under names that look secret, and passwords in URLs, are hidden.

The names decide, not the values. A secret that is given without a name, as a positional argument, looks like any text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from celery_capacity.routing.errors import mask_url

#: Text that stands for a hidden value.
HIDDEN: Final = "***"
#: Members of arguments that are examined: more than the thousand characters of a representation can show.
MAX_MEMBERS: Final = 1000
#: Levels of lists and dicts that are examined, one more than a representation shows.
LEVELS: Final = 4

_NAME: Final = re.compile(
    r"passw|passphrase|pwd|secret|token|api_?-?key|access_?-?key|private_?-?key|credential|authorization|bearer|cookie",
    re.IGNORECASE,
)
_PLAIN: Final = (str, int, float, type(None))


def looks_secret(name: object) -> bool:
    """Return True if a value of this name must not be shown."""
    return isinstance(name, str) and _NAME.search(name) is not None


def hidden(arguments: Any) -> Any:
    """Return the arguments as they may be shown: the object itself where nothing is to be hidden, else a copy."""
    return _hidden(arguments, LEVELS, [MAX_MEMBERS])


def _hidden(value: Any, levels: int, left: list[int]) -> Any:
    """Hide values in the order in which a representation shows the members.

    So a member that is not examined is not shown either.
    """
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


#: Secret-looking name with its value, in the text of arguments, unless the value is hidden already.
_NAMED_VALUE: Final = re.compile(rf"""(?:{_NAME.pattern})[\w-]*['"]?\s*[:=](?!\s*['"]\*\*\*['"])""", re.IGNORECASE)


def hidden_text(text: str) -> str:
    """Return a text of arguments as it may be shown: whole, without the passwords of URLs, or not at all.

    The end of a value is not certain in a text, so nothing is shown if a value under a secret-looking name is not
    hidden already.
    """
    return HIDDEN if _NAMED_VALUE.search(text) else mask_url(text)


def hidden_lines(text: str) -> str:
    """Return a text of many lines, such as a message of a log or a traceback: each line as `hidden_text` shows it."""
    if "\n" not in text:
        return hidden_text(text)
    return "\n".join(map(hidden_text, text.split("\n")))


#: Headers in which a producer writes the arguments for people.
SHOWN_HEADERS: Final = ("argsrepr", "kwargsrepr")


def hidden_headers(headers: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message's headers without the texts of arguments, by its producer, that look secret."""
    return {name: HIDDEN if name in SHOWN_HEADERS and looks_secret(value) else value for name, value in headers.items()}
