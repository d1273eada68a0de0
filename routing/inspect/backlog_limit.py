"""A limit on the backlog: a submission is refused while so many jobs wait."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import redis
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from celery_capacity.routing.database.postgres import translate
from celery_capacity.routing.errors import BacklogFull
from celery_capacity.routing.ledger import keys

#: Seconds for which a process goes by a count of the backlog.
COUNT_FOR: Final = 1.0
#: Shapes that are counted at the most; each has one waiting job at least.
MOST_SHAPES: Final = 10_000


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
