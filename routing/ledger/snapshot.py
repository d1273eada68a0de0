"""Reads of the ledger: the values in Redis as plain values, in a constant number of round trips.

Nothing here decides or writes. Amounts are integers (millicores, bytes, counts). Times are milliseconds of the server's
own clock. Errors of a client pass through as `redis.exceptions.RedisError`, because only the caller knows which other
store to ask.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from operator import itemgetter
from typing import Any, Final

import redis

from celery_capacity.routing.ledger import keys
from celery_capacity.routing.model.states import WorkerStatus
from celery_capacity.routing.model.token import NO_ATTEMPT, Token
from celery_capacity.routing.policy.labels import labels_of_text
from celery_capacity.routing.policy.placement import Book
from celery_capacity.routing.policy.reservation import Reservation
from celery_capacity.routing.redis_commands import packed_reading

#: Statuses of a running worker.
LIVE: Final = frozenset({WorkerStatus.READY, WorkerStatus.DRAINING})
#: Bytes of a job's value that are read for its head: more than any head has, and little of its message.
HEAD_BYTES: Final = 1024
#: State of a job's key that holds nothing any more: the job has ended, or went back to Postgres.
TOMBSTONE: Final = "ended"


def read_many(client: redis.Redis, commands: Iterable[Sequence[str]]) -> list[Any]:
    """Send all commands at once, and return their replies in order, as the server gives them.

    This takes a third of the CPU time of a pipeline of redis-py, which keeps an object for each command.
    Only for commands that read: an interrupted call may have been carried out. Raises `RedisError`, also where the
    server refuses a single command.
    """
    packed = [packed_reading(command) for command in commands]
    if not packed:
        return []
    pool = client.connection_pool
    connection: Any = pool.get_connection()
    try:
        connection.send_packed_command([b"".join(packed)])
        return [connection.read_response() for _ in packed]
    except BaseException:
        # Unread replies would answer the next caller's commands.
        connection.disconnect()
        raise
    finally:
        pool.release(connection)


@dataclass(frozen=True, slots=True)
class WorkerBook:
    """Book of a worker.

    `lease`: end of its lease (ms). `shrunk`: the capacity was lowered below the allocations. `kept`: the shape for
    which the worker takes nothing else, "" for none. `catalogue`: that of its registered tasks, "" where it takes any.
    `cordoned`: cordoned or draining by an operator, "" for neither.
    `ends`: the end of the worker itself (ms), None where none is known.
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
    cordoned: str = ""
    ends: int | None = None
    #: Its labels, by key.
    labels: Mapping[str, str] = field(default_factory=dict)
    #: Reservation of a worker that is kept for a job which need not be alone, None for another worker.
    reservation: Reservation | None = None

    @property
    def is_ready(self) -> bool:
        """Return True if jobs may be admitted while its lease runs."""
        return self.status == WorkerStatus.READY and not self.cordoned

    def is_live(self, now: int) -> bool:
        """Return True if the worker counts as live at `now` (ms): its lease runs, and its book is not closed."""
        return self.lease > now and self.status in LIVE

    def over(self) -> tuple[str, ...]:
        """Return the resources whose allocations exceed the capacity."""
        return tuple(self.to_policy(0).exceeded)

    def to_policy(self, now: int, catalogues: Mapping[str, Collection[str]] | None = None) -> Book:
        """Return the book in the form that the policy takes. Without `catalogues` its worker takes any task."""
        admitting = self.lease > now and self.is_ready
        tasks = catalogues.get(self.catalogue) if catalogues is not None else None
        left = None if self.ends is None else self.ends - now
        reserved_at = self.reservation.at if self.reservation else None
        return Book(
            self.worker, self.capacity, self.allocated, admitting, self.kept, tasks, left, reserved_at, self.labels
        )


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
    #: Number of waiting jobs that stay in Postgres, by shape. `shapes` has these shapes too.
    staying: Mapping[str, int] = field(default_factory=dict)
    #: True if the memory of the server is short, so that jobs which find no room stay in Postgres.
    tight: bool = False
    #: Paused shapes that are kept out of the index of waiting shapes. `shapes` has them too.
    withheld: frozenset[str] = frozenset()
    #: True if jobs stay in Postgres that `staying` may not count: nobody has marked their rows yet.
    left: bool = False
    #: End of the last reconcile (ms), None where none is noted.
    reconciled: int | None = None

    def is_registered(self, worker: WorkerBook) -> bool:
        """Return True if a worker counts as registered in this epoch: it has not left, and is not given up as lost."""
        return worker.epoch == self.epoch

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
    pipe.mget(keys.ALLOCATED, keys.ALLOCATED_CPUS, keys.RECONCILED)
    pipe.hgetall(keys.COUNTERS)
    pipe.xlen(keys.STREAM)
    pipe.xrange(keys.STREAM, count=1)
    pipe.hgetall(keys.STAYING)
    pipe.smembers(keys.WITHHELD)
    pipe.exists(keys.LEFT)
    (server, time, opened, leases, shapes, numbers, counters, unapplied, oldest, stays, withheld, left) = pipe.execute()
    opening, staying = _texts(opened), {shape: int(number) for shape, number in _texts(stays).items()}
    warm = "epoch" in opening and opening.get("run_id") == server.get("run_id")
    return Head(
        now=int(time[0]) * 1000 + int(time[1]) // 1000,
        epoch=int(opening["epoch"]) if warm else None,
        leases={text(worker): int(lease) for worker, lease in leases},
        shapes=tuple(dict.fromkeys([*map(text, shapes), *sorted(map(text, withheld)), *staying])),
        withheld=frozenset(map(text, withheld)),
        allocated=None if numbers[0] is None else int(numbers[0]),
        allocated_cpus=None if numbers[1] is None else text(numbers[1]),
        reconciled=None if numbers[2] is None else int(numbers[2]),
        counters={name: int(value) for name, value in sorted(_texts(counters).items())},
        unapplied=int(unapplied),
        unapplied_since=int(text(oldest[0][0]).partition("-")[0]) if oldest else None,
        staying={shape: number for shape, number in staying.items() if number > 0},
        tight="tight" in opening,
        left=bool(left),
    )


def read_books(client: redis.Redis, workers: Iterable[str]) -> dict[str, WorkerBook]:
    """Read the books of these workers, by name, in one round trip; a worker without a book is left out."""
    names = list(workers)
    replies = read_many(client, (("HGETALL", keys.book(worker)) for worker in names))
    books = (parse_book(worker, reply) for worker, reply in zip(names, replies, strict=True))
    return {book.worker: book for book in books if book is not None}


def parse_book(worker: str, reply: Any) -> WorkerBook | None:
    """Read a book from the reply to HGETALL; None where it is missing or torn (COLD for that worker, never 0)."""
    layout, values = _layout_and_values(reply)
    if layout.lease is None:
        return None
    rest = {name: values[at] for name, at in layout.rest}
    return WorkerBook(
        worker=worker,
        epoch=int(rest["epoch"]),
        incarnation=text(rest.get("incarnation", "")),
        status=text(rest.get("status", WorkerStatus.CLOSED.value)),
        queue=text(rest.get("queue", "")),
        lease=int(rest["lease"]),
        capacity={name: int(values[at]) for name, at in layout.capacity},
        allocated={name: int(values[at]) for name, at in layout.allocated},
        shrunk=text(rest.get("shrunk", "")) == "1",
        kept=text(rest.get("kept", "")),
        catalogue=text(rest.get("tasks", "")),
        cordoned=text(rest.get("cordoned", "")),
        ends=int(rest["ends"]) if "ends" in rest else None,
        labels=labels_of_text(text(rest["labels"])) if "labels" in rest else {},
        reservation=_reservation(worker, rest) if "kept_at" in rest else None,
    )


def part_book(reply: Any) -> BookParts | None:
    """Return the kind of a book, its allocations as they came, and the end of its lease; None for no whole book.

    Books of one kind differ in their worker, its end, its allocations and the jobs that it is kept for.
    """
    layout, values = _layout_and_values(reply)
    if layout.lease is None:
        return None
    return (layout, layout.kind_of(values)), (layout, layout.allocated_of(values)), int(values[layout.lease])


def _reservation(worker: str, fields: Mapping[str, Any]) -> Reservation:
    beside = dict(part.split("=") for part in text(fields.get("beside", "")).split(",") if part)
    return Reservation(
        worker,
        text(fields["kept"]),
        int(fields["kept_order"]),
        int(fields["kept_at"]),
        {name: int(amount) for name, amount in beside.items()},
        int(fields["kept_since"]),
    )


def read_catalogues(
    client: redis.Redis, catalogues: Collection[str], tasks: Collection[str]
) -> dict[str, frozenset[str]]:
    """Return which of these tasks each catalogue has, in one round trip."""
    pairs_asked = [(catalogue, task) for catalogue in catalogues for task in tasks]
    replies = read_many(client, (("SISMEMBER", keys.tasks(catalogue), task) for catalogue, task in pairs_asked))
    members = {pair for pair, reply in zip(pairs_asked, replies, strict=True) if reply}
    return {catalogue: frozenset(task for task in tasks if (catalogue, task) in members) for catalogue in catalogues}


@dataclass(frozen=True, slots=True, eq=False)
class BookLayout:
    """Places of the values in a book. `lease`: None in a torn one. `kind_of`, `allocated_of`: for `part_book`."""

    capacity: tuple[tuple[str, int], ...]
    allocated: tuple[tuple[str, int], ...]
    rest: tuple[tuple[str, int], ...]
    lease: int | None
    kind_of: Callable[[Sequence[Any]], tuple[Any, ...]]
    allocated_of: Callable[[Sequence[Any]], tuple[Any, ...]]


#: Kind of a book, its allocations, and the end of its lease, as `part_book` returns them.
BookParts = tuple[Hashable, tuple[BookLayout, tuple[Any, ...]], int]
#: Fields of a book that are read, beside amounts: those that many workers have alike, and a worker's own.
_KIND_FIELDS: Final = frozenset({"epoch", "status", "cordoned", "shrunk", "tasks", "labels"})
_OWN_FIELDS: Final = frozenset(
    {"incarnation", "queue", "lease", "ends", "kept", "kept_at", "kept_since", "kept_order", "beside"}
)


def _layout_and_values(reply: Any) -> tuple[BookLayout, Sequence[Any]]:
    """Return the parts of a reply to HGETALL: a mapping, or a flat list in the older protocol."""
    if isinstance(reply, dict):
        return _book_layout(tuple(reply)), list(reply.values())
    return _book_layout(tuple(reply[::2])), reply[1::2]


@lru_cache(maxsize=1024)
def _book_layout(fields: tuple[bytes | str, ...]) -> BookLayout:
    """Return the layout of a book with these fields. Books of a cluster have few, so a book is read by places alone."""
    positions = {text(field): at for at, field in enumerate(fields)}
    names = positions.items()
    return BookLayout(
        capacity=tuple((name[2:], at) for name, at in names if name.startswith("c.")),
        allocated=tuple((name[2:], at) for name, at in names if name.startswith("a.")),
        rest=tuple((name, at) for name, at in names if name in _KIND_FIELDS | _OWN_FIELDS),
        lease=positions["lease"] if "epoch" in positions and "lease" in positions else None,
        kind_of=_picker([at for name, at in names if name in _KIND_FIELDS or name.startswith("c.")]),
        allocated_of=_picker([at for name, at in names if name.startswith("a.")]),
    )


def _picker(positions: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """Return a function that gives the values at these positions."""
    return itemgetter(*positions) if len(positions) > 1 else lambda values: tuple(values[at] for at in positions)


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
    #: True if the use of its tenant has its amounts.
    counted: bool = False
    #: The incarnation of its worker that holds the job.
    incarnation: str | None = None

    @property
    def is_tombstone(self) -> bool:
        """Return True if the ledger holds the job no more: it has ended, or went back to Postgres."""
        return self.state == TOMBSTONE

    @property
    def unapplied(self) -> bool:
        return self.entry is not None


def parse_job(value: bytes) -> dict[str, str]:
    """Read the fields of a job from its value or the beginning of it; a field that the job lacks is left out.

    The result is empty for an unknown job.
    """
    lines = value.split(b"\n", len(keys.HEAD_LINES))[: len(keys.HEAD_LINES)]
    fields = {name: text(line) for name, line in zip(keys.HEAD_LINES, lines, strict=False) if line}
    marks = (mark.partition("=") for mark in fields.pop("marks", "").split(",") if mark)
    return fields | {name: mark for name, _, mark in marks}


def read_jobs(client: redis.Redis, jobs: Iterable[str]) -> dict[str, dict[str, str]]:
    """Read the fields of these jobs, by id, in one round trip; unknown jobs are left out."""
    ids = list(jobs)
    pipe = client.pipeline(transaction=False)
    for job in ids:
        pipe.getrange(keys.job(job), 0, HEAD_BYTES - 1)
    return parse_jobs(client, dict(zip(ids, pipe.execute(), strict=True)))


def parse_jobs(client: redis.Redis, values: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Read the fields of jobs from the first `HEAD_BYTES` of their values; unknown jobs are left out.

    A job whose head is uncommonly long is read once more, as a whole.
    """
    fields: dict[str, dict[str, str]] = {}
    for job, value in values.items():
        if len(value) == HEAD_BYTES and value.count(b"\n") < len(keys.HEAD_LINES):
            value = client.get(keys.job(job)) or b""
        if value:
            fields[job] = parse_job(value)
    return fields


def read_cards(client: redis.Redis, jobs: Iterable[str]) -> dict[str, JobCard]:
    """Read the cards of these jobs, by id, in one round trip; unknown jobs are left out."""
    return {job: _card(fields) for job, fields in read_jobs(client, jobs).items()}


def _card(fields: Mapping[str, str]) -> JobCard:
    return JobCard(
        state=fields.get("state", ""),
        token=_token(fields.get("epoch"), fields.get("attempt")),
        worker=fields.get("worker"),
        shape=fields.get("shape"),
        order=int(fields["order"]) if "order" in fields else None,
        entry=fields.get("entry"),
        outcome=fields.get("outcome"),
        final=fields.get("final") == "1",
        counted=fields.get("counted") == "1",
        incarnation=fields.get("incarnation"),
    )


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
