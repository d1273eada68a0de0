"""The one value behind `cluster`, the dashboard and the metrics: capacity, allocations, backlog at a moment.

The ledger gives it in three round trips, however many workers there are. Where the ledger is cold or does not answer,
Postgres gives it in four queries. `source` names the store.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Final

import redis as redispy
from redis.exceptions import RedisError
from sqlalchemy import Connection, Engine, func, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from celery_capacity.routing.database import schema
from celery_capacity.routing.database.authority import read_authority
from celery_capacity.routing.database.postgres_errors import translate
from celery_capacity.routing.errors import NotMigrated, mask_url
from celery_capacity.routing.insert.key_lines import KeyLine
from celery_capacity.routing.inspect import held_back
from celery_capacity.routing.inspect.waiting import (
    BacklogLine,
    blocked_first,
    merged,
    queue_reads,
    read_backlog,
    with_left,
)
from celery_capacity.routing.inspect.worker_lines import (
    SEEN,
    WHOLE,
    LedgerWorkers,
    Others,
    Page,
    WorkerLine,
    named_amounts,
    row_line,
    without_collection,
)
from celery_capacity.routing.ledger import keys, snapshot
from celery_capacity.routing.model import amounts
from celery_capacity.routing.model.amounts import CPUS, MEMORY, SLOTS, is_named
from celery_capacity.routing.model.request import Request, terms_of
from celery_capacity.routing.model.states import State, Store
from celery_capacity.routing.policy.labels import named_worker
from celery_capacity.routing.store import quarantine
from celery_capacity.routing.store.controls import Orders
from celery_capacity.routing.store.quarantine import Quarantined

#: Seconds without a heartbeat after which Postgres no longer counts a worker, where the caller does not say.
WORKER_TTL: Final = 60.0
#: Reason of an overview from Postgres where the ledger has no epoch.
COLD: Final = "the ledger is cold"


@dataclass(frozen=True, slots=True)
class Overview:
    """The cluster at the time `at`. `source`: the store that gave the values, ledger or postgres.

    `workers`: the live workers on the page, or all of them. `others`: the live ones that are left out.
    """

    source: Store
    at: datetime
    workers: tuple[WorkerLine, ...]
    backlog: tuple[BacklogLine, ...]
    counters: Mapping[str, int] = field(default_factory=dict)
    #: transitions in the ledger that Postgres does not have yet; None where only Postgres was asked
    unapplied: int | None = None
    #: Seconds since the oldest of these was noted, 0 where there is none.
    unapplied_age: float | None = None
    #: messages that nobody could read; None where Postgres was not asked, or does not answer
    quarantine: Quarantined | None = None
    #: why Postgres was asked and not the ledger; empty where the ledger answered
    why: str = ""
    #: millicores that workers without a lease still have allocated: their jobs have not been taken back yet
    lapsed_cpus: int = 0
    #: what operators hold back, also of workers that are down
    orders: Orders = field(default_factory=Orders)
    #: the keys that hold the most jobs back by their limits
    keys: tuple[KeyLine, ...] = ()
    #: True if the memory of Redis is short, so that jobs which find no room stay in Postgres
    memory_short: bool = False
    #: end of the last reconcile; None where none is noted, or only Postgres was asked
    reconciled_at: datetime | None = None
    #: The workers to show. The sums are over all workers.
    page: Page = WHOLE
    others: Others = field(default_factory=Others)

    @property
    def shown(self) -> tuple[tuple[WorkerLine, ...], str | None]:
        """Return the lines on the page, and the name behind which the next page begins; None where there is none."""
        by_name = {worker.name: worker for worker in self.workers}
        names, last = self.page.of([*by_name, *self.others.names])
        return tuple(by_name[name] for name in names), last

    @property
    def resources(self) -> list[str]:
        """Return the resources that a worker has and not every worker must have, such as GPUs and licences, by name."""
        names = {name for worker in self.workers for name in (*worker.capacity, *worker.allocated)}
        names.update(self.others.capacity, self.others.allocated)
        return sorted(name for name in names if is_named(name))

    @property
    def live(self) -> set[str]:
        """Return the names of all live workers."""
        return {worker.name for worker in self.workers} | self.others.names

    def total(self, name: str) -> int:
        return sum(worker.capacity.get(name, 0) for worker in self.workers) + self.others.capacity.get(name, 0)

    def allocated(self, name: str) -> int:
        return sum(worker.allocated.get(name, 0) for worker in self.workers) + self.others.allocated.get(name, 0)

    def available(self, name: str) -> int:
        """Return the free amount, never negative: capacity may shrink below the present allocations."""
        return max(0, self.total(name) - self.allocated(name))

    @property
    def is_new(self) -> bool:
        """Return whether nothing has run yet: there is no ledger, no worker and no job that waits."""
        return self.why == COLD and not self.live and not self.backlog

    @property
    def waiting(self) -> int:
        return sum(line.waiting for line in self.backlog)

    @property
    def utilization_percent(self) -> float:
        total = self.total(CPUS)
        return round(100 * self.allocated(CPUS) / total, 2) if total else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the object that `cluster --json` prints and `/api/v1/dashboard` answers with."""
        totals = amounts.add_up([*(worker.capacity for worker in self.workers), self.others.capacity])
        used = amounts.add_up([*(worker.allocated for worker in self.workers), self.others.allocated])
        free = {name: max(0, totals[name] - used.get(name, 0)) for name in totals}
        shown, last = self.shown
        return {
            "resources": {
                "total_cpus": amounts.cpus_number(totals.get(CPUS, 0)),
                "allocated_cpus": amounts.cpus_number(used.get(CPUS, 0)),
                "available_cpus": amounts.cpus_number(free.get(CPUS, 0)),
                "utilization_percent": self.utilization_percent,
                "active_workers": len(self.live),
                "total_memory": totals.get(MEMORY, 0),
                "allocated_memory": used.get(MEMORY, 0),
                "available_memory": free.get(MEMORY, 0),
                "total_slots": totals.get(SLOTS, 0),
                "allocated_slots": used.get(SLOTS, 0),
                "available_slots": free.get(SLOTS, 0),
                "named": named_amounts(totals, used),
                "waiting_jobs": self.waiting,
            },
            "workers": [worker.to_json() for worker in shown],
            "next_after": last,
            "backlog": [line.to_json() for line in self.backlog],
            **self.orders.to_json(),
            "keys": [line.to_json() for line in self.keys],
            "counters": dict(self.counters),
            "source": self.source.value,
            "unapplied": self.unapplied,
            "unapplied_seconds": None if self.unapplied_age is None else round(self.unapplied_age, 3),
            "memory_short": self.memory_short,
            "reconciled_at": None if self.reconciled_at is None else _iso(self.reconciled_at),
            "quarantine": None if self.quarantine is None else self.quarantine.to_json(),
            "at": _iso(self.at),
        }


def _iso(moment: datetime) -> str:
    return moment.isoformat(timespec="milliseconds")


class Cold(Exception):
    """The ledger is cold and has no current values of the cluster."""


def read(client: redispy.Redis, engine: Engine, ttl: float = WORKER_TTL, page: Page = WHOLE) -> Overview:
    """Read the overview from the ledger, else from Postgres. `client`: a `quick_client`; `ttl`: see `from_postgres`.

    Only Postgres has the quarantine. Raises StoreUnavailable where neither store answers, NotMigrated where Postgres
    has no tables.
    """
    try:
        if _postgres_decides(engine):
            raise Cold("Postgres decides, and the books are old")
        return replace(held_back.added(from_ledger(client, page, engine), engine), quarantine=quarantined(engine))
    except (RedisError, Cold) as error:
        try:
            with engine.connect() as connection:
                seen = held_back.added(from_postgres(connection, ttl), engine)
                return replace(seen, quarantine=quarantine.read(connection), why=mask_url(str(error)), page=page)
        except (DBAPIError, PoolTimeout) as second:
            raise translate(second, f"the ledger does not answer ({error}), and ") from second


def _postgres_decides(engine: Engine) -> bool:
    """Return whether Postgres decides instead of the ledger.

    False where Postgres does not answer: then the books are the best values that there are.
    """
    try:
        with engine.connect() as connection:
            return read_authority(connection).authority == Store.POSTGRES
    except (DBAPIError, PoolTimeout, NotMigrated):
        return False


def quarantined(engine: Engine) -> Quarantined | None:
    """Return the quarantine; None where Postgres does not answer, since the values of the ledger need not wait."""
    try:
        with engine.connect() as connection:
            return quarantine.read(connection)
    except (DBAPIError, PoolTimeout):
        return None


def from_ledger(client: redispy.Redis, page: Page = WHOLE, engine: Engine | None = None) -> Overview:
    """Read the index, the books and queues, and the ages, in three round trips. Raises Cold, or RedisError.

    Only the workers of the page have the fields that a heartbeat tells. `engine`: Postgres, which counts the waiting
    jobs that stay there while their rows are not marked.
    """
    with without_collection():
        head = snapshot.read_head(client)
        if head.epoch is None:
            raise Cold(COLD)
        if engine is not None and head.left:
            head = with_left(client, engine, head)
        live = [worker for worker, lease in head.leases.items() if lease > head.now]
        on_page, _ = page.of(live)
        views = (("HMGET", keys.view(worker), *SEEN) for worker in on_page)
        books = (("HGETALL", keys.book(worker)) for worker in head.leases)
        replies = iter(snapshot.read_many(client, (*views, *books, *queue_reads(head.shapes))))
        seen = {worker: next(replies) for worker in on_page}
        workers = LedgerWorkers(head, page, {worker: next(replies) for worker in head.leases}, seen)
        backlog = read_backlog(client, head, replies, workers.catalogues)
        # Empty workers are judged, so one of each kind is enough, and the workers that a line names.
        kinds = workers.kinds({named_worker(line.terms) for line in backlog})
        return Overview(
            source=Store.LEDGER,
            at=datetime.fromtimestamp(head.now / 1000, UTC),
            workers=workers.lines,
            others=workers.others,
            backlog=blocked_first(backlog, (*(line.to_policy() for line in kinds), *workers.silent)),
            lapsed_cpus=workers.lapsed,
            counters=head.counters,
            memory_short=head.tight,
            reconciled_at=None if head.reconciled is None else datetime.fromtimestamp(head.reconciled / 1000, UTC),
            unapplied=head.unapplied,
            unapplied_age=max(0, head.now - (head.unapplied_since or head.now)) / 1000,
            page=page,
        )


def from_postgres(connection: Connection, ttl: float = WORKER_TTL) -> Overview:
    """Read the overview from the tables alone. `ttl`: seconds after which a worker that was not seen is left out.

    An accepted job counts as waiting: it waits for the ledger.
    """
    workers, jobs = schema.workers.c, schema.jobs.c
    now: datetime = connection.execute(select(func.clock_timestamp())).scalar_one()
    allocated = _allocated(connection)
    incarnations = connection.execute(
        select(schema.workers).where(workers.status.in_(sorted(snapshot.LIVE))).order_by(workers.started_at.desc())
    ).all()
    # A name may have an older incarnation that has not ended yet. The newest one counts.
    newest = {row.name: row for row in reversed(incarnations)}
    rows = sorted(newest.values(), key=lambda row: str(row.name))
    registered = [row_line(row, now, allocated.get(row.incarnation, {})) for row in rows]
    lines = [line for line in registered if (line.heartbeat_age or 0) < ttl]
    queues = connection.execute(
        select(jobs.shape, func.count().label("waiting"), func.min(jobs.submitted_at).label("oldest"))
        .where(jobs.state.in_([State.ACCEPTED, State.WAITING]))
        .group_by(jobs.shape)
        .order_by(func.max(jobs.priority).desc(), func.min(jobs.seq))
    )
    backlog = merged(
        BacklogLine(
            Request.from_shape(row.shape),
            row.waiting,
            max(0.0, (now - row.oldest).total_seconds()),
            terms=terms_of(row.shape),
        )
        for row in queues
    )
    judged = blocked_first(backlog, [line.to_policy() for line in registered])
    return Overview(source=Store.POSTGRES, at=now.astimezone(UTC), workers=tuple(lines), backlog=judged)


def _allocated(connection: Connection) -> dict[str, dict[str, int]]:
    """Return the allocated amounts, by incarnation and resource."""
    jobs = schema.jobs.c
    held = connection.execute(
        select(jobs.incarnation, jobs.shape, func.count().label("jobs"))
        .where(jobs.state.in_([State.ADMITTED, State.RUNNING]))
        .group_by(jobs.incarnation, jobs.shape)
    )
    return sum_up((row.incarnation, row.shape, row.jobs) for row in held)


def sum_up(held: Iterable[tuple[str, str, int]]) -> dict[str, dict[str, int]]:
    """Return the amounts that each holder has allocated, by resource. `held`: (holder, shape, number of jobs)."""
    sums: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for holder, shape, number in held:
        for name, amount in Request.from_shape(shape).amounts:
            sums[holder][name] += number * amount
    return {holder: dict(by_name) for holder, by_name in sums.items()}


@dataclass(frozen=True, slots=True)
class Reads:
    """Result of many reads of the allocated CPUs: Redis answered `answered` of `times`, Postgres the others.

    `value`: the last value, in CPUs as text. `seconds`: for all reads.
    """

    times: int
    answered: int
    seconds: float
    value: str

    @property
    def share_percent(self) -> float:
        return 100 * self.answered / self.times


def read_allocated(client: redispy.Redis, engine: Engine, times: int) -> Reads:
    """Read the allocated CPUs `times` times in one pipeline. Postgres is asked for reads that Redis cannot answer.

    Raises StoreUnavailable where neither answers.
    """
    pipe = client.pipeline(transaction=False)
    for _ in range(times):
        pipe.get(keys.ALLOCATED_CPUS)
    start = time.perf_counter()
    try:
        values = [value for value in pipe.execute() if value is not None]
    except RedisError:
        values = []
    if len(values) == times:
        return Reads(times, times, time.perf_counter() - start, snapshot.text(values[-1]))
    try:
        with engine.connect() as connection:
            sums = _allocated(connection)
    except (DBAPIError, PoolTimeout) as error:
        raise translate(error, "Redis does not answer, and ") from error
    value = amounts.format_cpus(sum(by_name.get(CPUS, 0) for by_name in sums.values()))
    return Reads(times, len(values), time.perf_counter() - start, value)
