"""Reads of the ledger: the values in Redis as plain values, in a constant number of round trips.

Nothing here decides or writes. Amounts are integers (millicores, bytes, counts). Times are milliseconds of the server's
own clock. Errors of a client pass through as `redis.exceptions.RedisError`, because only the caller knows which other
store to ask.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import redis

from celery_capacity.routing.ledger import keys
from celery_capacity.routing.model.states import WorkerStatus
from celery_capacity.routing.model.token import NO_ATTEMPT, Token
from celery_capacity.routing.policy.placement import Book

#: Statuses of a running worker.
LIVE: Final = frozenset({WorkerStatus.READY, WorkerStatus.DRAINING})
#: State of a job's key that holds nothing any more: the job has ended, or went back to Postgres.
TOMBSTONE: Final = "ended"


@dataclass(frozen=True, slots=True)
class WorkerBook:
    """Book of a worker.

    `lease`: end of its lease (ms). `shrunk`: the capacity was lowered below the allocations. `kept`: the shape for
    which the worker takes nothing else, "" for none. `catalogue`: that of its registered tasks, "" where it takes any.
    """

    worker: str
    epoch: int
    incarnation: str
    status: str
    queue: str
    lease: int
    capacity: Mapping[str, int]
    allocated: Mapping[str, int]
    shrunk: bool = False
    kept: str = ""
    catalogue: str = ""

    def is_live(self, now: int) -> bool:
        """Return True if the worker counts as live at `now` (ms): its lease runs, and its book is not closed."""
        return self.lease > now and self.status in LIVE

    def over(self) -> tuple[str, ...]:
        """Return the resources whose allocations exceed the capacity."""
        return tuple(self.to_policy(0).exceeded)

    def to_policy(self, now: int, catalogues: Mapping[str, Collection[str]] | None = None) -> Book:
        """Return the book in the form that the policy takes. Without `catalogues` its worker takes any task."""
        admitting = self.lease > now and self.status == WorkerStatus.READY
        tasks = catalogues.get(self.catalogue) if catalogues is not None else None
        return Book(self.worker, self.capacity, self.allocated, admitting, self.kept, tasks)


@dataclass(frozen=True, slots=True)
class Head:
    """State of the ledger as a whole. `epoch` is None where it is cold."""

    now: int
    epoch: int | None
    leases: Mapping[str, int]
    shapes: tuple[str, ...]
    allocated: int | None
    allocated_cpus: str | None
    counters: Mapping[str, int]
    #: Number of stream entries that Postgres does not have, and the time of the oldest (ms), None where there is none.
    unapplied: int
    unapplied_since: int | None = None

    def is_live(self, worker: WorkerBook) -> bool:
        """Return True if a worker counts as live in this epoch."""
        return worker.epoch == self.epoch and worker.is_live(self.now)


def read_head(client: redis.Redis) -> Head:
    """Read the state of the ledger, in one round trip.

    A cold ledger was never opened, or was emptied, or was opened in another run of the server.
    """
    pipe = client.pipeline(transaction=False)
    pipe.info("server")
    pipe.time()
    pipe.hgetall(keys.EPOCH)
    pipe.zrange(keys.LEASES, 0, -1, withscores=True)
    pipe.zrange(keys.SHAPES, 0, -1)
    pipe.mget(keys.ALLOCATED, keys.ALLOCATED_CPUS)
    pipe.hgetall(keys.COUNTERS)
    pipe.xlen(keys.STREAM)
    pipe.xrange(keys.STREAM, count=1)
    server, time, opened, leases, shapes, allocated, counters, unapplied, oldest = pipe.execute()
    opening = _texts(opened)
    warm = "epoch" in opening and opening.get("run_id") == server.get("run_id")
    return Head(
        now=int(time[0]) * 1000 + int(time[1]) // 1000,
        epoch=int(opening["epoch"]) if warm else None,
        leases={text(worker): int(lease) for worker, lease in leases},
        shapes=tuple(text(shape) for shape in shapes),
        allocated=None if allocated[0] is None else int(allocated[0]),
        allocated_cpus=None if allocated[1] is None else text(allocated[1]),
        counters={name: int(value) for name, value in sorted(_texts(counters).items())},
        unapplied=int(unapplied),
        unapplied_since=int(text(oldest[0][0]).partition("-")[0]) if oldest else None,
    )


def read_books(client: redis.Redis, workers: Iterable[str]) -> dict[str, WorkerBook]:
    """Read the books of these workers, by name, in one round trip; a worker without a book is left out."""
    names = list(workers)
    pipe = client.pipeline(transaction=False)
    for worker in names:
        pipe.hgetall(keys.book(worker))
    books = (parse_book(worker, fields) for worker, fields in zip(names, pipe.execute(), strict=True))
    return {book.worker: book for book in books if book is not None}


def parse_book(worker: str, fields: Mapping[Any, Any]) -> WorkerBook | None:
    """Read a book from its hash; return None where it is missing or torn (COLD for that worker, never 0)."""
    values = _texts(fields)
    if "epoch" not in values or "lease" not in values:
        return None
    return WorkerBook(
        worker=worker,
        epoch=int(values["epoch"]),
        incarnation=values.get("incarnation", ""),
        status=values.get("status", WorkerStatus.CLOSED.value),
        queue=values.get("queue", ""),
        lease=int(values["lease"]),
        capacity={name[2:]: int(value) for name, value in values.items() if name.startswith("c.")},
        allocated={name[2:]: int(value) for name, value in values.items() if name.startswith("a.")},
        shrunk=values.get("shrunk") == "1",
        kept=values.get("kept", ""),
        catalogue=values.get("tasks", ""),
    )


@dataclass(frozen=True, slots=True)
class JobCard:
    """A job as the ledger has it, without its message.

    `entry`: its stream entry; until it is applied, Postgres is behind on the job. Of an ended job, `outcome` is that of
    its last attempt. `final`: the job does not come back.
    """

    state: str
    token: Token
    worker: str | None
    shape: str | None
    order: int | None = None
    entry: str | None = None
    outcome: str | None = None
    final: bool = False
    #: The incarnation of its worker that holds the job.
    incarnation: str | None = None

    @property
    def is_tombstone(self) -> bool:
        """Return True if the ledger holds the job no more: it has ended, or went back to Postgres."""
        return self.state == TOMBSTONE

    @property
    def unapplied(self) -> bool:
        return self.entry is not None


_CARD: Final = ("state", "epoch", "attempt", "worker", "shape", "order", "entry", "outcome", "final", "incarnation")


def read_cards(client: redis.Redis, jobs: Iterable[str]) -> dict[str, JobCard]:
    """Read the cards of these jobs, by id, in one round trip; unknown jobs are left out."""
    ids = list(jobs)
    pipe = client.pipeline(transaction=False)
    for job in ids:
        pipe.hmget(keys.job(job), *_CARD)
    cards = {}
    for job, values in zip(ids, pipe.execute(), strict=True):
        state, epoch, attempt, *rest = (None if v is None else text(v) for v in values)
        worker, shape, order, entry, outcome, final, incarnation = rest
        if state is not None:
            position, token = None if order is None else int(order), _token(epoch, attempt)
            cards[job] = JobCard(state, token, worker, shape, position, entry, outcome, final == "1", incarnation)
    return cards


def _token(epoch: str | None, attempt: str | None) -> Token:
    """Return the token in a job's key. A damaged key has no attempt."""
    try:
        return Token(int(epoch or 0), int(attempt or 0))
    except ValueError:
        return NO_ATTEMPT


def unapplied_jobs(entries: Sequence[tuple[Any, Mapping[Any, Any]]]) -> frozenset[str]:
    """Return the jobs that stream entries are about."""
    return frozenset(_texts(fields).get("job", "") for _, fields in entries)


def text(value: Any) -> str:
    """Return bytes from Redis as text; a client that decodes by itself may pass a string."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _texts(fields: Mapping[Any, Any]) -> dict[str, str]:
    return {text(name): text(value) for name, value in fields.items()}
