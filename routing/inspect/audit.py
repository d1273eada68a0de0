"""Read both stores once for the invariants, and collect suspicions in Redis, in Postgres, and between them.

A reading is no judgement. Work goes on meanwhile, and the stores are read one after the other, so a suspicion may be a
job on its way. `routing.inspect.verify` reads again and keeps only the suspicions that stay. So every suspicion names
its evidence, such as tokens and amounts, and two readings of different jobs never look alike.

A worker's book and the jobs that it holds are read in one transaction, so sums over them are exact at any time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final, NamedTuple, TypeVar

import redis as redispy
from sqlalchemy import Connection, Row, text

from celery_capacity.routing.inspect.overview import sum_up
from celery_capacity.routing.ledger import indexes, keys, snapshot
from celery_capacity.routing.ledger.snapshot import JobCard, WorkerBook
from celery_capacity.routing.model import amounts
from celery_capacity.routing.model.states import FINAL, HOLDING, State, Step
from celery_capacity.routing.model.token import Token
from celery_capacity.routing.policy.placement import asked_shape

#: Items in one pipeline. It takes some milliseconds of the server, so admission never waits long for a reader.
CHUNK: Final = 500
#: Most rows that a query for violations returns. The first rows are shown, the rest are counted.
MAX_VIOLATIONS: Final = 1000

_T = TypeVar("_T")
#: Observer of work: called with the steps that are done, of how many.
Progress = Callable[[float, float | None], object]


class Suspicion(NamedTuple):
    """A state that an invariant forbids, if it stays. `invariant`: I1 to I6."""

    invariant: str
    evidence: str


@dataclass(frozen=True, slots=True)
class PostgresReading:
    """A reading of Postgres. `active`: the jobs that are neither ended nor put off, by id."""

    active: Mapping[str, Row[Any]]
    suspicions: tuple[Suspicion, ...]

    @property
    def at_rest(self) -> bool:
        """Return whether no job waits or runs.

        A job that must not start before a later time does neither.
        """
        return all(row.state == State.REPLACED for row in self.active.values())


@dataclass(slots=True)
class LedgerReading:
    """A reading of Redis. Times in ms. `held` by worker: job -> text of a token. `waits` by shape: jobs in order."""

    head: snapshot.Head
    books: dict[str, WorkerBook] = field(default_factory=dict)
    held: dict[str, dict[str, str]] = field(default_factory=dict)
    index_entries: indexes.Indexes = field(default_factory=indexes.Indexes)
    waits: dict[str, list[tuple[str, int]]] = field(default_factory=dict)
    shapes: dict[str, int] = field(default_factory=dict)
    borders: dict[str, int] = field(default_factory=dict)
    unclaimed: list[str] = field(default_factory=list)
    cards: dict[str, JobCard] = field(default_factory=dict)
    in_stream: frozenset[str] = frozenset()
    allocated: tuple[int | None, str | None, int] = (None, None, 0)
    use: dict[str, int] = field(default_factory=dict)
    unknown_keys: list[str] = field(default_factory=list)
    wrong_expiry: list[str] = field(default_factory=list)

    def first_of(self, shape: str) -> int | None:
        """Return the order of the first job of a shape that may start: before its border, where it has one."""
        order = self.waits[shape][0][1] if self.waits[shape] else None
        border = self.borders.get(shape)
        return order if order is None or border is None or order < border else None

    def behind(self, job: str) -> bool:
        """Return whether Postgres may still lack the newest transition of a job, which is on its way there."""
        card = self.cards.get(job)
        return job in self.in_stream or (card is not None and card.unapplied)


# -- Postgres
# ----------------------------------------------------------------------------------------------------

_ACTIVE: Final = text("""
SELECT id, state, epoch, attempt, step, worker, shape, behind FROM jobs
WHERE state IN ('accepted', 'waiting', 'admitted', 'running', 'replaced') OR (state = 'scheduled' AND due_at
<= now()) OR step = 3 """)

_FINAL: Final = ", ".join(f"'{state.value}'" for state in sorted(FINAL))

#: Forbidden states: invariant, wording and query. The first column is the job, the others are the evidence.
_FORBIDDEN: Final = (
    (
        "I4",
        "has more than one open attempt: {0}",
        "SELECT job_id, string_agg(epoch || '.' || attempt, ', ' ORDER BY epoch, attempt) FROM attempts"
        " WHERE ended_at IS NULL GROUP BY job_id HAVING count(*) > 1",
    ),
    (
        "I4",
        "has attempt {0}.{1} after a token that is not older, {2}.{3}",
        "SELECT job_id, epoch, attempt, before_epoch, before_attempt FROM (SELECT job_id, epoch, attempt,"
        " lag(epoch) OVER w AS before_epoch, lag(attempt) OVER w AS before_attempt FROM attempts"
        " WINDOW w AS (PARTITION BY job_id ORDER BY epoch, attempt)) a WHERE attempt <= before_attempt",
    ),
    (
        "I4",
        "has attempt {0}.{1}, newer than its row, {2}.{3}",
        "SELECT j.id, a.epoch, a.attempt, j.epoch, j.attempt FROM jobs j JOIN attempts a ON a.job_id = j.id"
        " WHERE (a.epoch, a.attempt) > (j.epoch, j.attempt)",
    ),
    (
        "I4",
        "is {0}, and its attempt {1}.{2} is open",
        "SELECT j.id, j.state, a.epoch, a.attempt FROM attempts a JOIN jobs j ON j.id = a.job_id"
        f" WHERE a.ended_at IS NULL AND j.state IN ({_FINAL})",
    ),
    (
        "I4",
        "is {0}, and its last attempt {1}.{2} ended as {3}",
        "SELECT j.id, j.state, a.epoch, a.attempt, a.outcome FROM jobs j JOIN attempts a"
        " ON (a.job_id, a.epoch, a.attempt) = (j.id, j.epoch, j.attempt)"
        f" WHERE j.state IN ({_FINAL}) AND j.step = {Step.ENDED.value} AND a.outcome <> j.state",
    ),
)


def read_postgres(connection: Connection) -> PostgresReading:
    """Read the rows, as of one moment if the caller's transaction is REPEATABLE READ."""
    active = {row.id: row for row in connection.execute(_ACTIVE)}
    suspicions = tuple(
        Suspicion(invariant, f"job {row[0]} " + wording.format(*row[1:]))
        for invariant, wording, query in _FORBIDDEN
        for row in connection.execute(text(f"{query} LIMIT {MAX_VIOLATIONS}"))
    )
    return PostgresReading(active, suspicions)


# -- Redis
# -------------------------------------------------------------------------------------------------------


def read_ledger(client: redispy.Redis, progress: Progress | None = None) -> LedgerReading:
    """Read everything that the ledger holds. Raises RedisError. `progress`: called after each chunk of jobs."""
    ledger = LedgerReading(snapshot.read_head(client))
    families = _scan(client, ledger)
    workers = sorted(ledger.head.leases.keys() | families["book"] | families["held"])
    for chunk in _chunks(workers):
        names = indexes.read_index_names(client, chunk)
        pipe = client.pipeline(transaction=True)
        for worker in chunk:
            pipe.hgetall(keys.book(worker))
            pipe.hgetall(keys.held(worker))
            indexes.ask(pipe, worker, names[worker])
        replies = iter(pipe.execute())
        for worker in chunk:
            book = snapshot.parse_book(worker, next(replies))
            if book is not None:
                ledger.books[worker] = book
            ledger.held[worker] = {snapshot.text(job): snapshot.text(token) for job, token in next(replies).items()}
            indexes.note(ledger.index_entries, worker, names[worker], replies)
    indexes.read_rest(client, ledger.index_entries, families["free_of"], families["shapes_of"])
    ledger.allocated = _totals(client, workers)
    _read_queues(client, ledger, families["wait"])
    job_ids = families["job"].union(ledger.unclaimed, *ledger.held.values())
    job_ids.update(job for queue in ledger.waits.values() for job, _ in queue)
    for chunk in _chunks(sorted(job_ids)):
        ledger.cards.update(snapshot.read_cards(client, chunk))
        if progress is not None:
            progress(len(ledger.cards), len(job_ids))
    ledger.use = indexes.read_use(client)
    _read_expiries(client, ledger)
    return ledger


def _scan(client: redispy.Redis, ledger: LedgerReading) -> dict[str, set[str]]:
    """Return the names behind each prefix. Keys of no known family go to `ledger.unknown_keys`."""
    prefixes = {name: key for name, key in keys.KEYS.items() if key.endswith(":")}
    fixed = set(keys.KEYS.values()) - set(prefixes.values())
    names: dict[str, set[str]] = {name: set() for name in prefixes}
    for raw in client.scan_iter(match=keys.LEDGER, count=1000):
        key = snapshot.text(raw)
        family = next((name for name, prefix in prefixes.items() if key.startswith(prefix)), None)
        if family is not None:
            names[family].add(key.removeprefix(prefixes[family]))
        elif key not in fixed:
            ledger.unknown_keys.append(key)
    return names


def _totals(client: redispy.Redis, workers: Sequence[str]) -> tuple[int | None, str | None, int]:
    """Return `ledger:allocated`, `resource:allocated_cpus` and the sum over the books, as of one moment."""
    pipe = client.pipeline(transaction=True)
    pipe.mget(keys.ALLOCATED, keys.ALLOCATED_CPUS)
    for worker in workers:
        pipe.hget(keys.book(worker), "a.cpus")
    (total, shown), *sums = pipe.execute()
    return (
        None if total is None else int(total),
        None if shown is None else snapshot.text(shown),
        sum(int(cpus) for cpus in sums if cpus is not None),
    )


def _read_queues(client: redispy.Redis, ledger: LedgerReading, waiting: set[str]) -> None:
    pipe = client.pipeline(transaction=True)
    pipe.zrange(keys.SHAPES, 0, -1, withscores=True)
    pipe.zrange(keys.BORDER, 0, -1, withscores=True)
    pipe.zrange(keys.UNCLAIMED, 0, -1)
    pipe.xrange(keys.STREAM)
    shapes, borders, unclaimed, entries = pipe.execute()
    ledger.borders = {snapshot.text(shape): int(order) for shape, order in borders}
    ledger.shapes = {snapshot.text(shape): int(order) for shape, order in shapes}
    ledger.unclaimed = [snapshot.text(job) for job in unclaimed]
    ledger.in_stream = snapshot.unapplied_jobs(entries)
    for shape in sorted(waiting | ledger.shapes.keys()):
        members: Any = client.zrange(keys.wait(shape), 0, -1, withscores=True)
        ledger.waits[shape] = [(snapshot.text(job), int(order)) for job, order in members]


def _read_expiries(client: redispy.Redis, ledger: LedgerReading) -> None:
    """Collect the keys with a wrong expiry in `ledger.wrong_expiry`.

    A tombstone expires once Postgres has the end. Books never expire, since a missing book may be read as free
    capacity. Waiting jobs never expire either.
    """
    never = [keys.book(worker) for worker in ledger.books] + [keys.held(worker) for worker in ledger.held]
    never += [keys.job(job) for job, card in ledger.cards.items() if not card.is_tombstone]
    some = [keys.job(job) for job, card in ledger.cards.items() if card.is_tombstone and not card.unapplied]
    some += [snapshot.text(key) for key in client.scan_iter(match=keys.VIEWS, count=1000)]
    for names, expires in ((never, False), (some, True)):
        for chunk in _chunks(names):
            pipe = client.pipeline(transaction=False)
            for name in chunk:
                pipe.pttl(name)
            for name, left in zip(chunk, pipe.execute(), strict=True):
                # -2: the key is gone meanwhile. -1: it has no expiry.
                if left != -2 and (left >= 0) != expires:
                    ledger.wrong_expiry.append(f"{name} {'has no' if expires else 'has an'} expiry")


def _chunks(items: Iterable[_T]) -> Iterator[list[_T]]:
    rest = iter(items)
    while chunk := list(islice(rest, CHUNK)):
        yield chunk


# -- suspicions
# --------------------------------------------------------------------------------------------


def inspect(ledger: LedgerReading, postgres: PostgresReading, at_rest: bool, write_within: float) -> set[Suspicion]:
    """Return every suspicion of this reading; I2 and I3 only `at_rest`.

    `write_within`: seconds after which Postgres has every transition that the ledger noted.
    """
    if ledger.head.epoch is None:
        suspicions = set(postgres.suspicions)
        running = sorted(postgres.active)
        if running:
            suspicions.add(Suspicion("I6", f"the ledger is cold, and {len(running)} jobs are not ended"))
    else:
        suspicions = {*postgres.suspicions, *_books(ledger), *_queues(ledger), *_agreement(ledger, postgres)}
        suspicions |= {*_late(ledger, write_within)}
    if at_rest:
        suspicions |= {*_rest(ledger, postgres)}
    return suspicions


def _books(ledger: LedgerReading) -> Iterator[Suspicion]:
    """Check I1, no book is above its capacity and each is the sum of its jobs, and I4, no job is held twice."""
    holders: dict[str, list[str]] = {}
    for worker, held in ledger.held.items():
        for job in held:
            holders.setdefault(job, []).append(worker)
        book = ledger.books.get(worker)
        if book is None:
            if held:
                yield Suspicion("I1", f"worker {worker} has no book and holds {', '.join(sorted(held.items())[0])}")
            continue
        for name in book.over():
            used, there = book.allocated[name], book.capacity.get(name, 0)
            if not book.shrunk:
                yield Suspicion("I1", f"worker {worker} has {used} of {there} {name} allocated")
        cards = {job: ledger.cards.get(job) for job in held}
        unlike = [job for job, card in cards.items() if card is None or str(card.token) != held[job] or not card.shape]
        for job in unlike:
            yield Suspicion("I1", f"worker {worker} holds {job} {held[job]}, which the job's own key does not say")
        if not unlike:
            sums = sum_up((worker, card.shape or "", 1) for card in cards.values() if card)
            expected = sums.get(worker, {})
            for name in sorted(expected.keys() | book.allocated.keys()):
                used, sum_ = book.allocated.get(name, 0), expected.get(name, 0)
                if used != sum_:
                    yield Suspicion("I1", f"worker {worker} has {used} {name} allocated, its jobs hold {sum_}")
    for job, workers in holders.items():
        if len(workers) > 1:
            yield Suspicion("I4", f"job {job} is held by {', '.join(workers)}")


def _queues(ledger: LedgerReading) -> Iterator[Suspicion]:
    """Check I6: the ledger agrees with itself."""
    # A paused shape may stand anywhere in the indexes, or nowhere. It is put in its place when it is let go.
    withheld = ledger.head.withheld
    first = {shape: ledger.first_of(shape) for shape in ledger.waits if shape not in withheld}
    for wrong in (
        *indexes.wrong_workers(ledger.index_entries, ledger.books),
        *indexes.wrong_shapes(ledger.index_entries, first, withheld),
    ):
        yield Suspicion("I6", wrong)
    if (held := indexes.use_of(ledger.cards.values())) != ledger.use:
        yield Suspicion("I6", f"ledger:used is {ledger.use}, the jobs of the tenants hold {held}")
    total, shown, summed = ledger.allocated
    if total != summed:
        yield Suspicion("I6", f"ledger:allocated is {total}, the books have {summed}")
    if total is not None and shown != amounts.format_cpus(total):
        yield Suspicion("I6", f"resource:allocated_cpus is {shown}, ledger:allocated {total}")
    for shape, queue in ledger.waits.items():
        if shape in first and ledger.shapes.get(shape) != first[shape]:
            yield Suspicion(
                "I6", f"shape {shape} begins at {first[shape]}, and at {ledger.shapes.get(shape)} in the index"
            )
        for job, _ in queue:
            card = ledger.cards.get(job)
            if card is None or card.state != State.WAITING or card.shape != shape:
                yield Suspicion("I6", f"job {job} waits under {shape}, and its own key says {card}")
    for job in ledger.unclaimed:
        card = ledger.cards.get(job)
        if card is None or card.state != State.ADMITTED:
            yield Suspicion("I6", f"job {job} is to be delivered again, and its own key says {card}")
    for key in ledger.unknown_keys:
        yield Suspicion("I6", f"key {key} is of no known family")
    for key in ledger.wrong_expiry:
        yield Suspicion("I6", f"key {key}")


def _agreement(ledger: LedgerReading, postgres: PostgresReading) -> Iterator[Suspicion]:
    """Check I6: Redis equals Postgres, except for transitions that are on their way there."""
    redis_held = {job: f"{worker} {token}" for worker, held in ledger.held.items() for job, token in held.items()}
    rows_held = {
        job: f"{row.worker} {Token(row.epoch, row.attempt)}"
        for job, row in postgres.active.items()
        if row.state in HOLDING or row.step == Step.COMMITTED
    }
    redis_waits = {job: asked_shape(shape) for shape, queue in ledger.waits.items() for job, _ in queue}
    rows_wait = {job: row.shape for job, row in postgres.active.items() if _is_filed(row)}
    pairs = (("is held by", redis_held, rows_held), ("waits as", redis_waits, rows_wait))
    for verb, ours, theirs in pairs:
        for job in ours.keys() | theirs.keys():
            if ours.get(job) != theirs.get(job) and not ledger.behind(job):
                in_redis, in_postgres = ours.get(job, "nothing"), theirs.get(job, "nothing")
                yield Suspicion("I6", f"job {job} {verb} {in_redis} in Redis, {in_postgres} in Postgres")


def _is_filed(row: Any) -> bool:
    """Return whether the ledger has a row as a waiting job. Others stay in Postgres."""
    return row.state == State.WAITING and row.behind is None


def _late(ledger: LedgerReading, write_within: float) -> Iterator[Suspicion]:
    """Check I6: transitions on their way to Postgres arrive.

    Where no worker lives, nobody writes them, and nothing is reported.
    """
    if ledger.head.unapplied_since is None or not any(ledger.head.is_live(book) for book in ledger.books.values()):
        return
    if ledger.head.now - ledger.head.unapplied_since > write_within * 1000:
        # The evidence names no job: the oldest entry may change while Postgres stays late.
        yield Suspicion("I6", f"Postgres lacks what the ledger noted more than {write_within:g} s ago")


def _rest(ledger: LedgerReading, postgres: PostgresReading) -> Iterator[Suspicion]:
    """Check I2 and I3: all jobs have ended, and nothing is allocated."""
    for job, row in postgres.active.items():
        yield Suspicion("I2", f"job {job} is {row.state} at {row.epoch}.{row.attempt}")
        if row.state in HOLDING:
            yield Suspicion("I3", f"job {job} holds {row.shape} on {row.worker} in Postgres")
    for worker, book in ledger.books.items():
        for name, used in sorted(book.allocated.items()):
            if used:
                yield Suspicion("I3", f"worker {worker} has {used} {name} allocated")
    for worker, held in ledger.held.items():
        for job, token in held.items():
            yield Suspicion("I3", f"worker {worker} holds {job} {token}")
    if ledger.allocated[0]:
        yield Suspicion("I3", f"ledger:allocated is {ledger.allocated[0]}")
    for shape, queue in ledger.waits.items():
        if queue:
            yield Suspicion("I3", f"{len(queue)} jobs wait under {shape} in Redis, the first is {queue[0][0]}")
