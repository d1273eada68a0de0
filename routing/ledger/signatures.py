"""The arguments and replies of a script, by the names in its header.

The header is the contract of both sides. The loader makes a local of each argument in the script, and the binding
sends and reads values by the same names. So a name that is changed in the header alone fails on both sides.

    -- ARGV: epoch, run_id, worker (its name), then for each job: job, token, results (number of them), and for each of
    --   these: key, result
    -- Replies: {ok, admitted, then for each job: verdict} | {unknown}

A remark in brackets is for readers. In the script `worker` is the argument of that name, `EACH.first` the place of the
first repeated one, `EACH.step` the size of a group, `EACH.token` the place of a token in its group; `INNER` has the
same for the groups within a group.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

#: A group of arguments, by their names.
Group = Mapping[str, Any]

_REMARK: Final = re.compile(r"\s*\([^()]*\)")
_ARGUMENTS: Final = re.compile(r"(.*?)(?:(?:^|, )then for each [^:]*: (.*?))?(?:, and for each of these: (.*))?")
_REPLY: Final = re.compile(r"\{([^}]*)\}")


@dataclass(frozen=True, slots=True)
class Signature:
    """Names in a header.

    `once`: arguments before the groups. `each`: arguments of a group. `inner`: arguments of a group within a group,
    counted by the last of `each`. `replies`: the first word of each reply, and the names of its fields.
    """

    once: tuple[str, ...]
    each: tuple[str, ...]
    inner: tuple[str, ...]
    replies: Mapping[str, tuple[str, ...]]

    @property
    def has_gate(self) -> bool:
        """Return True if the script acts in an epoch only."""
        return self.once[:2] == ("epoch", "run_id")

    def positions(self) -> dict[str, dict[str, str]]:
        """Return the values that replace `EACH` and `INNER` in the script."""
        return {
            "EACH": {"first": str(len(self.once) + 1), **_group(self.each)},
            "INNER": _group(self.inner),
        }

    def arguments(self, values: Group, groups: Iterable[Group] = ()) -> list[Any]:
        """Return the arguments in their order. Raise `TypeError` for names that differ from those of the header."""
        arguments = _in_order(self.once, values)
        if not self.inner:
            for group in groups:
                arguments += _in_order(self.each, group)
            return arguments
        *_, counter = self.each
        for group in groups:
            arguments += _in_order(self.each, {**group, counter: len(group[counter])})
            for part in group[counter]:
                arguments += _in_order(self.inner, part)
        return arguments


def _group(names: tuple[str, ...]) -> dict[str, str]:
    return {"step": str(len(names)), **{name: str(index) for index, name in enumerate(names)}} if names else {}


def _in_order(names: tuple[str, ...], values: Group) -> list[Any]:
    if len(names) != len(values):
        raise TypeError(f"arguments {', '.join(names)} are needed, not {', '.join(values)}")
    try:
        return [values[name] for name in names]
    except KeyError as error:
        raise TypeError(f"arguments {', '.join(names)} are needed, not {', '.join(values)}") from error


def parse(arguments: str, replies: str) -> Signature:
    """Read the fields `ARGV` and `Replies` of a header."""
    parts = _ARGUMENTS.fullmatch(_REMARK.sub("", arguments))
    assert parts is not None  # each part of the expression may be empty
    once, each, inner = (_names(part or "") for part in parts.groups())
    fields_by_head: dict[str, tuple[str, ...]] = {}
    for reply in _REPLY.findall(_REMARK.sub("", replies)):
        heads, _, fields = reply.partition(",")
        for head in re.findall(r"\w+", heads):
            fields_by_head[head] = _names(fields.partition("then ")[0])
    return Signature(once, each, inner, fields_by_head)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


class Reply:
    """A reply of a script.

    `head`: its first word. `reply["cursor"]`: a field by its name. `rest`: the values of the groups after the fields.
    """

    __slots__ = ("_names", "_values", "head", "rest")

    def __init__(self, signature: Signature, values: list[str]) -> None:
        self.head = values[0]
        self._names = signature.replies[self.head]
        self._values = values
        self.rest = values[1 + len(self._names) :]

    def __getitem__(self, name: str) -> str:
        return self._values[1 + self._names.index(name)]

    def number(self, name: str) -> int:
        """Return a field that is a whole number."""
        return int(self[name])
