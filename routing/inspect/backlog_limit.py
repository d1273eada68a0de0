"""Limit the backlog: refuse a submission while so many jobs wait."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from celery_capacity.routing.database.postgres_errors import translate
from celery_capacity.routing.database.tenants import max_waiting, waiting_of
from celery_capacity.routing.errors import BacklogFull
from celery_capacity.routing.ledger import keys
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.policy.tenants import NAMED_TENANT, tenant_of

#: Seconds for which a process trusts a count of the backlog.
COUNT_FOR: Final = 1.0
#: A count is trusted for so many times its duration, where that is longer: Postgres may count a million rows.
TRUST: Final = 20
#: Most shapes that are counted. Each has at least one waiting job.
MAX_SHAPES: Final = 10_000


class BacklogLimit:
    """The limit of one process on new jobs: they are refused while `limit` jobs wait. Threads may share it.

    A count is trusted for `COUNT_FOR` seconds, or for `TRUST` times its duration. So together all processes may exceed
    the limit by the jobs that they submit within that time. `ledger` counts the waiting jobs in Redis, None where it
    cannot; only then `engine` is called.
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
        """Raise `BacklogFull` where `limit` jobs wait already. 0 is no limit."""
        if not limit:
            return
        now = self._clock()
        # Each job that this process sent since the count may wait. Only a new count can tell.
        if now >= self._until or self._waiting < limit <= self._waiting + self._since:
            self._waiting, self._since = self._count(limit), 0
            end = self._clock()
            self._until = end + max(COUNT_FOR, TRUST * (end - now))
        if self._waiting >= limit:
            raise BacklogFull(f"{limit} jobs or more wait already", value=limit)
        self._since += 1

    def _count(self, limit: int) -> int:
        waiting = self._ledger()
        return self._count_in_postgres(limit) if waiting is None else waiting

    def _count_in_postgres(self, limit: int) -> int:
        try:
            with self._engine().connect() as connection:
                return waiting_in_postgres(connection, limit)
        except (OperationalError, PoolTimeout):
            # The insert that follows meets the same error, and reports it.
            return 0
        except DBAPIError as error:
            raise translate(error) from error


@dataclass(slots=True)
class _Count:
    """Count of a tenant's waiting jobs. `since`: those that this process sent after it. `until`: when it is too old."""

    limit: int
    waiting: int
    since: int
    until: float


class TenantLimit:
    """The limits on the waiting jobs of tenants, as one process keeps them. Threads may share it.

    A count is trusted as that of `BacklogLimit`. A job without a tenant is not looked at, and costs nothing.
    """

    def __init__(self, engine: Callable[[], Engine], clock: Callable[[], float] = time.monotonic) -> None:
        self._engine = engine
        self._clock = clock
        self._counts: dict[str, _Count] = {}

    def check(self, shape: str) -> None:
        """Raise `BacklogFull` where as many jobs of the shape's tenant wait as its rule allows."""
        if NAMED_TENANT not in shape:
            return
        tenant, now = tenant_of(shape), self._clock()
        count = self._counts.get(tenant)
        if count is None or now >= count.until or count.waiting < count.limit <= count.waiting + count.since:
            asked = self._ask(tenant)
            end = self._clock()
            count = self._counts[tenant] = _Count(*asked, 0, end + max(COUNT_FOR, TRUST * (end - now)))
        if count.limit and count.waiting >= count.limit:
            message = f"{count.limit} jobs or more of tenant {tenant} wait already"
            raise BacklogFull(message, value=count.limit)
        count.since += 1

    def _ask(self, tenant: str) -> tuple[int, int]:
        try:
            with self._engine().connect() as connection:
                limit = max_waiting(connection, tenant)
                return limit, waiting_of(connection, tenant, limit) if limit else 0
        except (OperationalError, PoolTimeout):
            # The insert that follows meets the same error, and reports it.
            return 0, 0
        except DBAPIError as error:
            raise translate(error) from error


def waiting_in_ledger(ledger: Ledger) -> int | None:
    """Count the waiting jobs, also those that stay in Postgres, in two round trips.

    Return None for a ledger that is cold or being rebuilt, or that left jobs in Postgres since the runner of the duties
    last marked them: it does not know how many.
    """
    pipe = ledger.client.pipeline(transaction=False)
    pipe.hmget(keys.EPOCH, "epoch", "rebuilding")
    pipe.zrange(keys.SHAPES, 0, MAX_SHAPES - 1)
    pipe.smembers(keys.WITHHELD)
    pipe.hgetall(keys.STAYING)
    pipe.exists(keys.KEYS["left"])
    (epoch, rebuilding), indexed, withheld, staying, left = ledger.execute(pipe)
    if epoch is None or rebuilding is not None or left:
        return None
    shapes = {*indexed, *withheld, *staying}
    for shape in shapes:
        pipe.zcard(keys.wait(shape.decode() if isinstance(shape, bytes) else shape))
    filed = sum(pipe.execute()) if shapes else 0
    return filed + sum(max(0, int(number)) for number in staying.values())


_WAITING: Final = text(
    "SELECT count(*) FROM (SELECT FROM jobs WHERE state IN ('accepted', 'waiting') LIMIT :most) AS waiting"
)


def waiting_in_postgres(connection: Connection, most: int) -> int:
    """Return the number of waiting jobs, or `most` where more wait."""
    return int(connection.execute(_WAITING, {"most": most}).scalar_one())
