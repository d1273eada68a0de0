"""What is too much, and refused before anything is written: a message that is nested too deep, a backlog that is full.

Depth is read off the encoded text, without recursion: whoever decodes a deep text recurses, and may not come back. Most
messages have fewer brackets in all than levels are allowed, which two counts in C decide.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any, Final

import redis
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from celery_capacity.routing import keys
from celery_capacity.routing.errors import BacklogFull, MessageTooDeep
from celery_capacity.routing.postgres import translate

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

#: Seconds for which a process goes by a count of the backlog.
COUNT_FOR: Final = 1.0
#: Shapes that are counted at the most; each has one waiting job at least.
MOST_SHAPES: Final = 10_000

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


# -- the backlog


class BacklogLimit:
    """Says no to new jobs while `limit` wait. A count is trusted for `COUNT_FOR` seconds, so that together all
    processes may go beyond the limit by what they submit within that time.

    `ledger` counts what waits there, None where it does not say; `engine` is asked for only then. One for each
    process; threads may share it.
    """

    def __init__(
        self,
        ledger: Callable[[], int | None],
        engine: Callable[[], Engine],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ledger = ledger
        self._engine = engine
        self._clock = clock
        self._waiting = 0
        self._since = 0
        self._until = float("-inf")

    def check(self, limit: int) -> None:
        """Raise `BacklogFull` where so many jobs wait already; 0 is no limit."""
        if not limit:
            return
        now = self._clock()
        # Each job that this process sent since the count may wait; whether it does, only a new count says.
        if now >= self._until or self._waiting < limit <= self._waiting + self._since:
            self._waiting, self._since = self._count(limit), 0
            self._until = self._clock() + COUNT_FOR
        if self._waiting >= limit:
            raise BacklogFull(f"{limit} jobs or more wait already", value=limit)
        self._since += 1

    def _count(self, limit: int) -> int:
        found = self._ledger()
        if found is not None:
            return found
        try:
            with self._engine().connect() as connection:
                return waiting_in_postgres(connection, limit)
        except (OperationalError, PoolTimeout):
            # The insert that follows meets the same, and says what it is.
            return 0
        except DBAPIError as error:
            raise translate(error) from error


def waiting_in_ledger(client: redis.Redis) -> int | None:
    """How many jobs wait, in two round trips; None where the ledger is cold or its rebuild goes on."""
    pipe = client.pipeline(transaction=False)
    pipe.hmget(keys.EPOCH, "epoch", "rebuilding")
    pipe.zrange(keys.SHAPES, 0, MOST_SHAPES - 1)
    (epoch, rebuilding), shapes = pipe.execute()
    if epoch is None or rebuilding is not None:
        return None
    for shape in shapes:
        pipe.zcard(keys.wait(shape.decode() if isinstance(shape, bytes) else shape))
    return sum(pipe.execute()) if shapes else 0


_WAITING: Final = text(
    "SELECT count(*) FROM (SELECT FROM jobs WHERE state IN ('accepted', 'waiting') LIMIT :most) AS waiting"
)


def waiting_in_postgres(connection: Connection, most: int) -> int:
    """How many jobs wait, counted to `most`."""
    return int(connection.execute(_WAITING, {"most": most}).scalar_one())
