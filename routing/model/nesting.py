"""Limits on the nesting of a message: checked before anything is written.

The depth is read from the encoded text, without recursion: a decoder recurses, and a deep text may end the process.
Most messages have fewer brackets than the levels that are allowed, so two counts in C are enough.
"""

from __future__ import annotations

import re
from typing import Any, Final

from celery_capacity.routing.errors import MessageTooDeep

#: Content type whose text is examined.
JSON: Final = "application/json"
#: Levels of lists and dicts that one argument or one header may have.
MAX_LEVELS: Final = 50
#: Levels of the canvas that follows a task: its chain, chord and links, where each step takes four to eight. Decoding
#: recurses, and Python allows some 1,000 levels.
MAX_CANVAS_LEVELS: Final = 500
#: Levels around an argument (the body, then args or kwargs), and around a header (the message, then its headers).
AROUND: Final = 2
#: Levels that are removed one by one, at C's speed; the rest is examined bracket by bracket.
SHALLOW: Final = 8
#: Prefix of Celery's own tasks (`celery.chord`, `celery.group`), whose arguments are a canvas.
CANVAS_PREFIX: Final = "celery."

_LISTS: Final = (list, tuple, set, frozenset)
_STRING: Final = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_BRACKETS: Final = b"[]{}"
_OTHERS: Final = bytes(set(range(256)) - set(_BRACKETS))


def check_body(body: bytes, task: object) -> None:
    """Raise `MessageTooDeep` where the JSON `[args, kwargs, {callbacks, chain, ...}]` of a task is nested too deep."""
    canvas = isinstance(task, str) and task.startswith(CANVAS_PREFIX)
    arguments = MAX_CANVAS_LEVELS if canvas else MAX_LEVELS
    for part, levels in enumerate(_levels(body)):
        limit = arguments if part < 2 else MAX_CANVAS_LEVELS
        if levels > limit:
            _refuse("an argument" if part < 2 else "the canvas that follows the task", levels, limit)


def check_headers(envelope: bytes) -> None:
    """Raise `MessageTooDeep` where the headers are nested too deep, in the JSON text of a whole message."""
    levels = max(_levels(envelope), default=0)
    if levels > MAX_LEVELS:
        _refuse("a header", levels, MAX_LEVELS)


def check_value(value: Any, task: object) -> None:
    """Raise `MessageTooDeep` where a body that is not encoded as JSON is nested too deep.

    The value itself is walked through, without recursion.
    """
    canvas = isinstance(task, str) and task.startswith(CANVAS_PREFIX)
    limit = MAX_CANVAS_LEVELS if canvas else MAX_LEVELS
    level, members_of_level = 0, [value]
    while members_of_level:
        inside: dict[int, Any] = {}
        for item in members_of_level:
            members = item.values() if isinstance(item, dict) else item if isinstance(item, _LISTS) else None
            if members is None:
                continue
            # An empty list is a level too, as it is in the text.
            if level >= limit + AROUND:
                _refuse("an argument", level + 1 - AROUND, limit)
            # Take each member once. Where each list holds the next one twice, each level has twice as many members.
            inside.update((id(member), member) for member in members)
        level, members_of_level = level + 1, list(inside.values())


def _levels(document: bytes) -> list[int]:
    """Return how deep each member of a JSON array or object is nested, without the levels around an argument.

    Return an empty list where no member can be too deep.
    """
    if document.count(b"[") + document.count(b"{") <= MAX_LEVELS:
        return []
    brackets = shallow = _STRING.sub(b"", document).translate(None, _OTHERS)
    for _ in range(SHALLOW):
        shallow = shallow.replace(b"[]", b"").replace(b"{}", b"")
    if not shallow:
        return []
    depth, deepest, levels = 0, 0, []
    for bracket in brackets:
        if bracket in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        else:
            depth -= 1
            if depth == 1:
                levels.append(deepest - AROUND)
                deepest = 0
    # A text with an open bracket is no JSON, and is refused where it is read. Here its depth counts all the same.
    return [*levels, deepest - AROUND] if depth > 0 else levels


def _refuse(what: str, levels: int, limit: int) -> None:
    raise MessageTooDeep(f"{what} is nested {levels} levels deep, {limit} are allowed", value=levels)
