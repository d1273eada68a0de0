"""How deep a message may be nested: checked before anything is written.

Depth is read off the encoded text, without recursion: whoever decodes a deep text recurses, and may not come back. Most
messages have fewer brackets in all than levels are allowed, which two counts in C decide.
"""

from __future__ import annotations

import re
from typing import Any, Final

from celery_capacity.routing.errors import MessageTooDeep

#: The content type whose text is looked at.
JSON: Final = "application/json"
#: Levels of lists and dicts that one argument or one header may have.
MOST_LEVELS: Final = 50
#: Levels of what follows a task (its chain, chord and links), where each step takes four to eight. Decoding them
#: recurses, and Python allows some 1,000.
MOST_CANVAS_LEVELS: Final = 500
#: Levels around an argument (the body, then args or kwargs), and around a header (the message, then its headers).
AROUND: Final = 2
#: Levels that are taken off at C's speed, one by one; what is left is looked at bracket by bracket.
SHALLOW: Final = 8
#: Tasks with this prefix are Celery's own (`celery.chord`, `celery.group`): their arguments are a canvas.
CANVAS_PREFIX: Final = "celery."

_LISTS: Final = (list, tuple, set, frozenset)
_STRING: Final = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_BRACKETS: Final = b"[]{}"
_OTHERS: Final = bytes(set(range(256)) - set(_BRACKETS))


def check_body(body: bytes, task: object) -> None:
    """Raise `MessageTooDeep` where the JSON `[args, kwargs, {callbacks, chain, ...}]` of a task is nested too deep."""
    canvas = isinstance(task, str) and task.startswith(CANVAS_PREFIX)
    arguments = MOST_CANVAS_LEVELS if canvas else MOST_LEVELS
    for part, levels in enumerate(_levels(body)):
        if levels > (arguments if part < 2 else MOST_CANVAS_LEVELS):
            _refuse("an argument" if part < 2 else "the canvas that follows the task", levels)


def check_headers(envelope: bytes) -> None:
    """The same for the headers of a message, in the JSON text of the whole of it."""
    levels = max(_levels(envelope), default=0)
    if levels > MOST_LEVELS:
        _refuse("a header", levels)


def check_value(value: Any, task: object) -> None:
    """The same as `check_body`, for a body that is not encoded as JSON: the value itself is walked through."""
    canvas = isinstance(task, str) and task.startswith(CANVAS_PREFIX)
    limit = MOST_CANVAS_LEVELS if canvas else MOST_LEVELS
    level, here = 0, [value]
    while here:
        inside: dict[int, Any] = {}
        for one in here:
            members = one.values() if isinstance(one, dict) else one if isinstance(one, _LISTS) else None
            if members is None:
                continue
            # (An empty list is a level too, as it is in the text.)
            if level >= limit + AROUND:
                _refuse("an argument", level + 1 - AROUND)
            # Once each: what holds the same list twice, which does so too, has twice as many members on each level.
            inside.update((id(member), member) for member in members)
        level, here = level + 1, list(inside.values())


def _levels(document: bytes) -> list[int]:
    """How deep each member of a JSON array or object is nested, without the levels around an argument; nothing where
    none can be too deep."""
    if document.count(b"[") + document.count(b"{") <= MOST_LEVELS:
        return []
    brackets = shallow = _STRING.sub(b"", document).translate(None, _OTHERS)
    for _ in range(SHALLOW):
        shallow = shallow.replace(b"[]", b"").replace(b"{}", b"")
    if not shallow:
        return []
    depth, deepest, found = 0, 0, []
    for bracket in brackets:
        if bracket in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        else:
            depth -= 1
            if depth == 1:
                found.append(deepest - AROUND)
                deepest = 0
    # What is not closed is no JSON, and refused as such where it is read; it is deep all the same.
    return [*found, deepest - AROUND] if depth > 0 else found


def _refuse(what: str, levels: int) -> None:
    raise MessageTooDeep(f"{what} is nested {levels} levels deep, {MOST_LEVELS} are allowed", value=levels)
