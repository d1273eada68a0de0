"""Reading the ledger: what stands in Redis, as plain values, in round trips whose number does not grow.

Nothing here decides or writes. Amounts are integers (millicores, bytes, counts), times are milliseconds of
the server's own clock. A client's errors pass through as `redis.exceptions.RedisError`: the caller knows what
else it could ask.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import redis

from celery_capacity.routing.ledger import keys
from celery_capacity.routing.policy.placement import Book

#: Statuses of a worker that runs; `closed` is one whose lease ran out.
LIVE: Final = frozenset({"ready", "draining"})


@dataclass(frozen=True, slots=True)
class WorkerBook:
    """One worker's book. `lease`: its end (ms). `shrunk`: its capacity was lowered below what it holds. `kept`: the
    shape for which it takes nothing else, "" for none."""

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

    def is_live(self, now: int) -> bool:
        """Whether the worker counts as there at `now` (ms): its lease has not run out, it is not closed."""
        return self.lease > now and self.status in LIVE

    def over(self) -> tuple[str, ...]:
        """The resources of which more is allocated than there is."""
        return tuple(self.to_policy(0).exceeded)

    def to_policy(self, now: int) -> Book:
        """The book as the policy takes it."""
        admitting = self.lease > now and self.status == "ready"
        return Book(self.worker, self.capacity, self.allocated, admitting, self.kept)


@dataclass(frozen=True, slots=True)
class Head:
    """What the ledger says of itself. `epoch` is None where it is cold."""

    now: int
    epoch: int | None
    leases: Mapping[str, int]
    shapes: tuple[str, ...]
    allocated: int | None
    allocated_cpus: str | None
    counters: Mapping[str, int]
    #: Entries that Postgres does not have, and when the oldest was made (ms); None: there is none.
    unapplied: int
    unapplied_since: int | None = None

    def is_live(self, worker: WorkerBook) -> bool:
        """Whether a worker counts as there, in this epoch."""
        return worker.epoch == self.epoch and worker.is_live(self.now)


def read_head(client: redis.Redis) -> Head:
    """One round trip. Cold is: never opened, emptied, or opened in another life of the server."""
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
    own = _texts(opened)
    warm = "epoch" in own and own.get("run_id") == server.get("run_id")
    return Head(
        now=int(time[0]) * 1000 + int(time[1]) // 1000,
        epoch=int(own["epoch"]) if warm else None,
        leases={text(worker): int(lease) for worker, lease in leases},
        shapes=tuple(text(shape) for shape in shapes),
        allocated=None if allocated[0] is None else int(allocated[0]),
        allocated_cpus=None if allocated[1] is None else text(allocated[1]),
        counters={name: int(value) for name, value in sorted(_texts(counters).items())},
        unapplied=int(unapplied),
        unapplied_since=int(text(oldest[0][0]).partition("-")[0]) if oldest else None,
    )


def read_books(client: redis.Redis, workers: Iterable[str]) -> dict[str, WorkerBook]:
    """The books of these workers, by name, in one round trip; a worker without a book is left out."""
    names = list(workers)
    pipe = client.pipeline(transaction=False)
    for worker in names:
        pipe.hgetall(keys.book(worker))
    found = (parse_book(worker, fields) for worker, fields in zip(names, pipe.execute(), strict=True))
    return {book.worker: book for book in found if book is not None}


def parse_book(worker: str, fields: Mapping[Any, Any]) -> WorkerBook | None:
    """A book from its hash; None where it is missing or torn (COLD for that worker, never 0)."""
    own = _texts(fields)
    if "epoch" not in own or "lease" not in own:
        return None
    return WorkerBook(
        worker=worker,
        epoch=int(own["epoch"]),
        incarnation=own.get("incarnation", ""),
        status=own.get("status", "closed"),
        queue=own.get("queue", ""),
        lease=int(own["lease"]),
        capacity={name[2:]: int(value) for name, value in own.items() if name.startswith("c.")},
        allocated={name[2:]: int(value) for name, value in own.items() if name.startswith("a.")},
        shrunk=own.get("shrunk") == "1",
        kept=own.get("kept", ""),
    )


@dataclass(frozen=True, slots=True)
class JobCard:
    """What the ledger knows of one job, without its message. `entry`: of the stream; until it is applied, Postgres is
    behind on the job. Of one that ended: the `outcome` of its last attempt, and `final`, that it does not come back."""

    state: str
    token: str
    worker: str | None
    shape: str | None
    order: int | None = None
    entry: str | None = None
    outcome: str | None = None
    final: bool = False
    #: The life of its worker that holds it.
    incarnation: str | None = None

    @property
    def unapplied(self) -> bool:
        return self.entry is not None


_CARD: Final = ("state", "epoch", "attempt", "worker", "shape", "order", "entry", "outcome", "final", "incarnation")


def read_cards(client: redis.Redis, jobs: Iterable[str]) -> dict[str, JobCard]:
    """The cards of these jobs, by id, in one round trip; unknown jobs are left out."""
    ids = list(jobs)
    pipe = client.pipeline(transaction=False)
    for job in ids:
        pipe.hmget(keys.job(job), *_CARD)
    cards = {}
    for job, values in zip(ids, pipe.execute(), strict=True):
        state, epoch, attempt, *rest = (None if v is None else text(v) for v in values)
        worker, shape, order, entry, outcome, final, life = rest
        if state is not None:
            place = None if order is None else int(order)
            token = f"{epoch}.{attempt}"
            cards[job] = JobCard(state, token, worker, shape, place, entry, outcome, final == "1", life)
    return cards


def unapplied_jobs(entries: Sequence[tuple[Any, Mapping[Any, Any]]]) -> frozenset[str]:
    """The jobs that stream entries are about."""
    return frozenset(_texts(fields).get("job", "") for _, fields in entries)


def text(value: Any) -> str:
    """Redis' bytes as text; a client that decodes by itself is served too."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _texts(fields: Mapping[Any, Any]) -> dict[str, str]:
    return {text(name): text(value) for name, value in fields.items()}
