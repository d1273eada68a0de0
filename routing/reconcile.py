"""Making the ledger equal Postgres, and saying what differed.

First the stream is applied: what it says is not drift, Postgres is only behind. Then both are compared, in both
directions, in chunks of one round trip each, so that no admission waits for it. What looks different is read again
before anything is touched, and each repair is a script or statement that checks once more: work goes on meanwhile.

Which store is right: a row with an entry in the stream is not judged. Else Postgres is, except where the ledger has a
newer token: then the entry was lost with the stream, and Postgres is brought forward.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from redis.exceptions import RedisError
from sqlalchemy import Connection, Engine, text

from routing import backlog, books, enroll, keys, roster, store, stream
from routing.books import JobCard
from routing.errors import StoreUnavailable
from routing.ledger import Ledger
from routing.policy import order
from routing.replies import Adopted
from routing.states import HOLDING, State, Step
from routing.store import Transition

#: Jobs compared in one step.
CHUNK: Final = 500
FINAL_OR_GONE: Final = "ended"


@dataclass
class Reconciled:
    """`applied`: entries of the stream; `checked`: jobs compared; `found` and `repaired`: differences by kind."""

    applied: int = 0
    checked: int = 0
    found: Counter[str] = field(default_factory=Counter)
    repaired: Counter[str] = field(default_factory=Counter)

    @property
    def drift(self) -> int:
        return self.found.total()

    @property
    def all_repaired(self) -> bool:
        return self.found == self.repaired

    def note(self, kind: str, repaired: bool) -> None:
        self.found[kind] += 1
        if repaired:
            self.repaired[kind] += 1

    def counts(self) -> dict[str, int]:
        return {"applied": self.applied, "drift": self.drift, "repaired": self.repaired.total()}

    def to_json(self) -> dict[str, Any]:
        return {
            "applied": self.applied,
            "checked": self.checked,
            "drift": self.drift,
            "repaired": self.repaired.total(),
            "kinds": dict(sorted(self.found.items())),
        }


@dataclass(frozen=True, slots=True)
class Row:
    """What is compared of a row."""

    id: str
    seq: int
    state: str
    epoch: int
    attempt: int
    worker: str | None
    incarnation: str | None
    shape: str
    priority: int
    losses: int
    admitted_ms: int
    started_ms: int

    @property
    def token(self) -> tuple[int, int]:
        return self.epoch, self.attempt

    def agrees(self, card: JobCard | None) -> bool:
        """Whether the ledger says the same of it."""
        if card is None or card.state == FINAL_OR_GONE:
            return self.state == State.ACCEPTED or self.state not in (State.WAITING, *HOLDING)
        if self.state != card.state:
            return False
        return self.state == State.WAITING or (token_of(card) == self.token and card.worker == self.worker)


_COLUMNS: Final = (
    "SELECT id, seq, state, epoch, attempt, worker, incarnation, shape, priority, losses, "
    "coalesce((extract(epoch FROM admitted_at) * 1000)::bigint, 0), "
    "coalesce((extract(epoch FROM started_at) * 1000)::bigint, 0) FROM jobs "
)
_OPEN: Final = text(
    _COLUMNS + "WHERE state IN ('waiting', 'admitted', 'running') AND seq > :after ORDER BY seq LIMIT :most"
)
_THESE: Final = text(_COLUMNS + "WHERE id = ANY(CAST(:ids AS text[]))")


def token_of(card: JobCard) -> tuple[int, int]:
    epoch, _, attempt = card.token.partition(".")
    return int(epoch), int(attempt)


def reconcile(engine: Engine, ledger: Ledger) -> Reconciled:
    """One pass over everything. Raises `LedgerClosed` when the ledger is cold: there is nothing to compare then."""
    result = Reconciled()
    try:
        with engine.connect() as connection:
            ledger.epoch = roster.read_authority(connection).epoch
            result.applied, applied = stream.apply_all(engine, ledger)
            enroll.go_on(engine, ledger, applied)
            _rows_against_ledger(connection, ledger, result)
            _ledger_against_rows(connection, ledger, result)
            _queues(ledger, result)
            _books(ledger, result)
        if result.drift:
            ledger.client.hincrby(keys.COUNTERS, "drift", result.drift)
    except RedisError as error:
        raise StoreUnavailable(f"Redis stopped answering during reconcile: {error}") from error
    return result


def _rows_against_ledger(connection: Connection, ledger: Ledger, result: Reconciled) -> None:
    after = -1
    while True:
        rows = [Row(*row) for row in connection.execute(_OPEN, {"after": after, "most": CHUNK})]
        if not rows:
            return
        after = rows[-1].seq
        result.checked += len(rows)
        cards = books.read_cards(ledger.client, [row.id for row in rows])
        suspects = [row.id for row in rows if not row.agrees(cards.get(row.id))]
        for row, card in _still_different(connection, ledger, suspects):
            kind = f"{row.state} in Postgres, {card.state if card else 'missing'} in the ledger"
            result.note(kind, _repair(connection, ledger, row, card))


def _still_different(
    connection: Connection, ledger: Ledger, suspects: Sequence[str]
) -> Iterator[tuple[Row, JobCard | None]]:
    """Of the suspects those that differ when the ledger is read between two equal readings of Postgres."""
    if not suspects:
        return
    before = _rows(connection, suspects)
    cards = books.read_cards(ledger.client, suspects)
    after = _rows(connection, suspects)
    for job in suspects:
        row, card = before.get(job), cards.get(job)
        if row is None or row != after.get(job) or row.agrees(card) or (card is not None and card.unapplied):
            continue
        yield row, card


def _rows(connection: Connection, ids: Sequence[str]) -> dict[str, Row]:
    return {row[0]: Row(*row) for row in connection.execute(_THESE, {"ids": list(ids)})}


def _repair(connection: Connection, ledger: Ledger, row: Row, card: JobCard | None) -> bool:
    known = card is not None and card.state != FINAL_OR_GONE
    if card is not None and known and token_of(card) > row.token:
        return _bring_forward(connection, ledger, row, card)
    if card is not None and known and not ledger.drop(row.id, card.token, final=False):
        return False
    if row.state == State.WAITING:
        return _submit(connection, ledger, row.id)
    return _hold_again(connection, ledger, row)


def _bring_forward(connection: Connection, ledger: Ledger, row: Row, card: JobCard) -> bool:
    """The ledger is ahead and its entry was lost: Postgres gets what it says."""
    values = ledger.client.hmget(keys.job(row.id), "incarnation", "admitted", "started", "losses")
    incarnation, admitted, started, losses = (books.text(value) if value else "" for value in values)
    epoch, attempt = token_of(card)
    steps = {State.WAITING: Step.FILED, State.ADMITTED: Step.ADMITTED, State.RUNNING: Step.RUNNING}
    return bool(
        store.apply(
            connection,
            [
                Transition(
                    job=row.id,
                    epoch=epoch,
                    attempt=attempt,
                    state=card.state,
                    step=steps[State(card.state)],
                    worker=card.worker or "",
                    incarnation=incarnation,
                    admitted_ms=int(admitted or 0),
                    started_ms=int(started or 0),
                    at_ms=ledger.now_ms(),
                    losses=int(losses or 0),
                )
            ],
        )
    )


def _submit(connection: Connection, ledger: Ledger, job: str) -> bool:
    pending = backlog.these(connection, [job])
    return bool(pending) and enroll.submit_rows(ledger, pending) == 1


def _hold_again(connection: Connection, ledger: Ledger, row: Row) -> bool:
    """Postgres says that a worker holds it: enter it into that worker's book; without one it is submitted again."""
    if row.worker and row.incarnation:
        held = Adopted(
            row.id,
            f"{row.epoch}.{row.attempt}",
            row.shape,
            order(row.priority, row.seq),
            row.admitted_ms,
            row.started_ms,
            "",
            row.losses,
        )
        if not ledger.adopt(row.worker, row.incarnation, [held]):
            return True
    taken = store.apply(
        connection,
        [
            Transition(
                job=row.id,
                epoch=row.epoch,
                attempt=row.attempt,
                state=State.ACCEPTED,
                step=Step.BACK,
                worker=row.worker or "",
                incarnation=row.incarnation or "",
                admitted_ms=row.admitted_ms,
                started_ms=row.started_ms,
                at_ms=ledger.now_ms(),
                losses=row.losses,
                outcome="taken_back",
                error="the ledger did not know it",
            )
        ],
    )
    return bool(taken) and _submit(connection, ledger, row.id)


def _ledger_against_rows(connection: Connection, ledger: Ledger, result: Reconciled) -> None:
    """Jobs that the ledger has and Postgres has ended, or never had; and what a job's own keys say of each other."""
    prefix = len(keys.KEYS["job"])
    batch: list[str] = []
    for key in ledger.client.scan_iter(match=keys.JOBS, count=CHUNK):
        batch.append(key.decode()[prefix:])
        if len(batch) == CHUNK:
            _check_cards(connection, ledger, batch, result)
            batch = []
    if batch:
        _check_cards(connection, ledger, batch, result)


def _check_cards(connection: Connection, ledger: Ledger, ids: Sequence[str], result: Reconciled) -> None:
    cards = {
        job: card for job, card in books.read_cards(ledger.client, ids).items() if card.state != FINAL_OR_GONE
    }
    rows = _rows(connection, list(cards))
    open_states = {State.ACCEPTED, State.WAITING, State.SCHEDULED, *HOLDING}
    for job, card in cards.items():
        row = rows.get(job)
        if card.unapplied or (row is not None and row.state in open_states):
            continue
        # Read in this order the row can only be newer than the card; drop checks the card once more.
        result.note(
            f"{row.state if row else 'missing'} in Postgres, {card.state} in the ledger",
            ledger.drop(job, card.token, final=True),
        )
    _check_places(connection, ledger, cards, result)


def _check_places(
    connection: Connection, ledger: Ledger, cards: dict[str, JobCard], result: Reconciled
) -> None:
    """A waiting job stands in the queue of its shape, one that is held in the list of its worker."""
    pipe = ledger.client.pipeline(transaction=False)
    for job, card in cards.items():
        if card.state == State.WAITING:
            pipe.zscore(keys.wait(card.shape or ""), job)
        else:
            pipe.hget(keys.held(card.worker or ""), job)
    for (job, card), place in zip(list(cards.items()), pipe.execute(), strict=True):
        if place is not None:
            continue
        now = books.read_cards(ledger.client, [job]).get(job)
        if now is None or now.state != card.state or now.token != card.token:
            continue
        if card.state == State.WAITING:
            if ledger.mend(card.shape or "", job):
                result.note("waiting without a place", True)
                ledger.place(card.shape or "")
        elif not card.unapplied and ledger.client.hget(keys.held(card.worker or ""), job) is None:
            row = _rows(connection, [job]).get(job)
            repaired = (
                row is not None
                and row.state in HOLDING
                and ledger.drop(job, card.token, final=False)
                and _hold_again(connection, ledger, row)
            )
            result.note("held without a place", repaired)


def _queues(ledger: Ledger, result: Reconciled) -> None:
    """Each queue of a shape holds jobs that wait, and the index of shapes knows it."""
    prefix = len(keys.KEYS["wait"])
    shapes = {key.decode()[prefix:] for key in ledger.client.scan_iter(match=keys.WAITS, count=CHUNK)}
    shapes |= {books.text(shape) for shape in ledger.client.zrange(keys.SHAPES, 0, -1)}
    for shape in sorted(shapes):
        batch: list[str] = []
        for member, _ in ledger.client.zscan_iter(keys.wait(shape), count=CHUNK):
            batch.append(member.decode())
            if len(batch) >= CHUNK:
                _check_queue(ledger, shape, batch, result)
                batch = []
        _check_queue(ledger, shape, batch, result)
        if ledger.mend(shape):
            result.note("a shape out of its place", True)


def _check_queue(ledger: Ledger, shape: str, jobs: Sequence[str], result: Reconciled) -> None:
    cards = books.read_cards(ledger.client, jobs)
    for job in jobs:
        card = cards.get(job)
        if (card is None or card.state != State.WAITING or card.shape != shape) and ledger.mend(shape, job):
            result.note("a place without a waiting job", True)


def _books(ledger: Ledger, result: Reconciled) -> None:
    """Each book is the sum of what is held, and the whole is the sum of the books."""
    prefix = len(keys.KEYS["book"])
    workers = sorted(key.decode()[prefix:] for key in ledger.client.scan_iter(match=keys.BOOKS, count=CHUNK))
    for worker in workers:
        different = ledger.recount(worker)
        if different:
            result.note("a book that is not the sum", True)
            ledger.fill(worker)
    for _ in range(10):
        expected = int(ledger.client.get(keys.ALLOCATED) or 0)
        total = sum(
            book.allocated.get("cpus", 0) for book in books.read_books(ledger.client, workers).values()
        )
        if expected == total:
            return
        # Between two equal readings of the sum no admission or release came: the books were read as they are.
        if ledger.set_total(expected, total):
            result.note("a sum of CPUs that is not the sum of the books", True)
            return
    result.note("a sum of CPUs that is not the sum of the books", False)
