"""Make the ledger equal Postgres, and report the drift.

First the stream is applied: its entries are no drift, Postgres is only behind. Then both stores are compared, in both
directions, in chunks of one round trip each, so that no admission waits for it. Nearly all jobs are right. So Postgres
writes its state of them as text, and a script compares the text with the books. This process only carries it from one
store to the other. A job that looks different is read again before anything is touched. Each repair is a script or
statement that checks once more: work goes on meanwhile.

A job with an entry in the stream is not judged. Else Postgres is right, except where the ledger has a newer token or
step: then the entry was lost with the stream, and Postgres is brought forward.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from redis.exceptions import RedisError
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import OperationalError

from celery_capacity.routing.database.authority import read_authority
from celery_capacity.routing.database.postgres_errors import is_locked
from celery_capacity.routing.errors import StoreUnavailable
from celery_capacity.routing.ledger import keys, snapshot
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.ledger.replies import Adopted
from celery_capacity.routing.ledger.snapshot import JobCard
from celery_capacity.routing.model.request import filed_shape
from celery_capacity.routing.model.states import FINAL, HOLDING, Rank, State, Step, Store
from celery_capacity.routing.model.token import Token
from celery_capacity.routing.policy.placement import SUBMISSIONS, TOP_PRIORITY, order
from celery_capacity.routing.recovery import controls, reconcile_indexes, refill, resubmit, transition_log
from celery_capacity.routing.recovery.drift import Reconciled
from celery_capacity.routing.store import backlog, claims, fencing, job_transitions
from celery_capacity.routing.store.job_transitions import Transition

logger = logging.getLogger(__name__)

#: Jobs compared in one step.
CHUNK: Final = 500
#: The step by which a job came into its state in the ledger.
STEPS: Final = {State.WAITING: Step.FILED, State.ADMITTED: Step.ADMITTED, State.RUNNING: Step.RUNNING}


@dataclass(frozen=True, slots=True)
class Row:
    """The columns of a row that are compared. Times in milliseconds, 0 means none."""

    id: str
    name: str
    seq: int
    state: str
    token: Token
    step: int
    worker: str | None
    incarnation: str | None
    shape: str
    priority: int
    losses: int
    admitted_ms: int
    started_ms: int
    rerun: bool
    #: the shape under which it waits in Postgres alone
    behind: str | None

    @property
    def rank(self) -> Rank:
        return self.token, self.step

    def agrees(self, card: JobCard | None) -> bool:
        """Return whether the ledger agrees with this row."""
        if card is None or card.is_tombstone:
            if self.behind and self.state == State.WAITING:
                return True
            if self.state in (State.WAITING, *HOLDING):
                return False
            # Postgres lacks this outcome. A tombstone without an outcome is of a job that is being cancelled on its way
            # to the ledger.
            unknown = card is not None and card.final and card.outcome is not None and is_newer(card, self)
            return self.state in FINAL or not unknown
        if self.step == Step.COMMITTED:
            # The attempt ended the job itself, and its body goes on: its worker releases it.
            return (card.state, card.token) == (State.RUNNING, self.token)
        if self.step == Step.GIVEN_UP and card.state in HOLDING:
            # The worker lives after all. Postgres refuses its later claims, and takes its ends.
            return (card.token, card.worker) == (self.token, self.worker)
        if self.state != card.state:
            return False
        if self.state == State.WAITING:
            return card.order == order(self.priority, self.seq)
        return (card.token, card.worker) == (self.token, self.worker)


_COLUMNS: Final = (
    "SELECT id, name, seq, state, epoch, attempt, step, worker, incarnation, shape, priority, losses, "
    "coalesce((extract(epoch FROM admitted_at) * 1000)::bigint, 0), "
    "coalesce((extract(epoch FROM started_at) * 1000)::bigint, 0), rerun, behind FROM jobs "
)
#: The states of jobs that the ledger has, in the order in which most jobs go through them.
_OPEN: Final = (State.WAITING, State.ADMITTED, State.RUNNING)
#: Reads one state at a time, because the index has the rows of a state in their order.
_LINES: Final = text(f"""
SELECT max(seq), string_agg(concat_ws(' ', id, state, epoch || '.' || attempt, coalesce(worker, '-'),
  ({TOP_PRIORITY} - priority) * {SUBMISSIONS} + seq), chr(10))
FROM (SELECT seq, id, state, epoch, attempt, worker, priority FROM jobs
      WHERE state = :state AND behind IS NULL AND seq > :after ORDER BY seq LIMIT :most) AS j
""")
#: Families of keys besides those of the jobs.
_FAMILIES: Final = ("wait", "book", "held", "free_of", "shapes_of")
_GOING_ON: Final = text("SELECT id FROM jobs WHERE id = ANY(CAST(:ids AS text[])) AND finished_at IS NULL")
_THESE: Final = text(_COLUMNS + "WHERE id = ANY(CAST(:ids AS text[]))")


def rank_of(card: JobCard) -> Rank:
    """Return the rank of a job in the ledger, to be compared with the rank of its row."""
    return card.token, _ended_by(card) if card.is_tombstone else STEPS[State(card.state)]


def is_newer(card: JobCard, row: Row) -> bool:
    """Return whether the ledger knows more of a job than Postgres.

    A job that was cancelled without being in the ledger left a tombstone of no attempt. Such a tombstone says nothing
    about an attempt that Postgres knows.
    """
    return rank_of(card) > row.rank and card.token.attempt >= row.token.attempt


def _ended_by(card: JobCard) -> Step:
    if not card.final:
        return Step.BACK
    return Step.ENDED if card.outcome is not None else Step.DROPPED


def reconcile(engine: Engine, ledger: Ledger, observer: Callable[[int], object] | None = None) -> Reconciled:
    """Make one pass over everything. Raises `LedgerClosed` for a cold ledger: there is nothing to compare then."""
    result = Reconciled(observer=observer)
    try:
        with engine.connect() as connection:
            authority = read_authority(connection)
            if authority.authority != Store.LEDGER:
                raise StoreUnavailable(
                    "the ledger was lost and Postgres decides: there is nothing to compare",
                    advice="Look at Redis: when it has answered for a while, the ledger decides again.",
                )
            ledger.epoch = authority.epoch
            result.applied, applied = transition_log.apply_all(engine, ledger)
            resubmit.go_on(engine, ledger, applied)
            controls.restore(engine, ledger, result)
            compared = _rows_against_ledger(connection, ledger, result)
            names = _ledger_against_rows(connection, ledger, compared, result)
            _close_committed(connection, ledger, result)
            reconcile_indexes.check_queues(ledger, names["wait"], names["shapes_of"], result)
            reconcile_indexes.restore_waiting(ledger, names["wait"])
            refill.restore_borders(engine, ledger)
            reconcile_indexes.check_books(ledger, names["book"] | names["held"], names["free_of"], result)
            controls.count_held(ledger, names["held"])
            reconcile_indexes.check_use(ledger, names["held"], result)
        ledger.note_reconcile(result.drift)
    except RedisError as error:
        raise StoreUnavailable(f"Redis stopped answering during reconcile: {error}") from error
    return result


def look_at(engine: Engine, ledger: Ledger, ids: Sequence[str]) -> Reconciled:
    """Compare these jobs alone, and repair what differs. The caller's handle of the ledger is in Postgres's epoch."""
    result = Reconciled()
    with engine.connect() as connection:
        _look_at(connection, ledger, ids, result)
    return result


def _rows_against_ledger(connection: Connection, ledger: Ledger, result: Reconciled) -> set[str]:
    """Compare the jobs that wait or are held by Postgres with the ledger; return their ids."""
    compared: set[str] = set()
    for state in _OPEN:
        after = -1
        while True:
            last, rows = connection.execute(_LINES, {"state": state.value, "after": after, "most": CHUNK}).one()
            if last is None:
                break
            after = last
            ids = [row.partition(" ")[0] for row in rows.split("\n")]
            compared.update(ids)
            _look_at(connection, ledger, ledger.compare_jobs(rows), result)
            result.count(len(ids))
    return compared


def _ledger_against_rows(
    connection: Connection, ledger: Ledger, compared: set[str], result: Reconciled
) -> dict[str, set[str]]:
    """Compare the other jobs of the ledger: jobs that have ended in Postgres, are unknown there, or are ahead of it.

    Return the names of all other keys, by family. `compared`: jobs that were compared already.
    """
    names: dict[str, set[str]] = {family: set() for family in _FAMILIES}
    job, prefixes = keys.KEYS["job"], {family: keys.KEYS[family] for family in names}
    batch: list[str] = []
    for raw in ledger.client.scan_iter(match=keys.LEDGER, count=CHUNK):
        key = raw.decode()
        if not key.startswith(job):
            for family, prefix in prefixes.items():
                if key.startswith(prefix):
                    names[family].add(key[len(prefix) :])
            continue
        name = key[len(job) :]
        if name not in compared:
            batch.append(name)
        if len(batch) == CHUNK:
            _look_at(connection, ledger, _not_over(connection, ledger, batch), result)
            batch = []
    _look_at(connection, ledger, _not_over(connection, ledger, batch), result)
    return names


def _not_over(connection: Connection, ledger: Ledger, ids: Sequence[str]) -> list[str]:
    """Return the jobs that are not over in both stores. Nearly all others ended within the last minute."""
    going_on = list(connection.execute(_GOING_ON, {"ids": list(ids)}).scalars()) if ids else []
    over = set(ids).difference(going_on)
    return [*going_on, *ledger.compare_jobs("\n".join(f"{job} {snapshot.TOMBSTONE} - - -" for job in over))]


def _look_at(connection: Connection, ledger: Ledger, ids: Sequence[str], result: Reconciled) -> None:
    """Compare these jobs one by one, and check their places in the ledger."""
    if not ids:
        return
    cards = snapshot.read_cards(ledger.client, ids)
    if reconcile_indexes.clear_marks(ledger, cards, result):
        cards = snapshot.read_cards(ledger.client, ids)
    rows = _rows(connection, ids)
    suspects = [job for job in ids if _differ(rows.get(job), cards.get(job))]
    _repair_all(connection, ledger, suspects, result)
    standing = {job: card for job, card in cards.items() if not card.is_tombstone and job not in suspects}
    for job in reconcile_indexes.check_jobs(connection, ledger, standing, result):
        row = _rows(connection, [job]).get(job)
        if row is not None and ledger.remove_job(job, standing[job].token, final=False):
            result.note("held by a worker that has no book", _give_back(connection, ledger, row))


def _differ(row: Row | None, card: JobCard | None) -> bool:
    if row is None:
        return card is not None and not card.is_tombstone
    return not row.agrees(card)


def _close_committed(connection: Connection, ledger: Ledger, result: Reconciled) -> None:
    """Close jobs that ended themselves, where the report of the worker was lost with the ledger."""
    committed = fencing.committed(connection)
    for start in range(0, len(committed), CHUNK):
        rows = committed[start : start + CHUNK]
        cards = snapshot.read_cards(ledger.client, [job for job, _ in rows])
        on_their_way = {transition.job for transition in transition_log.unapplied(ledger)}
        for job, token in rows:
            card = cards.get(job)
            holds = card is not None and not card.is_tombstone and card.token == token
            if not holds and job not in on_their_way and fencing.close(connection, job, token):
                result.note("ended by itself, and not held")


def _repair_all(connection: Connection, ledger: Ledger, suspects: Sequence[str], result: Reconciled) -> None:
    """Repair the suspects that differ between two equal readings of Postgres, by the ledger in between.

    A job with an entry in the stream is on its way and not judged. The stream is read after the job. An entry that was
    applied before that shows as a difference between the readings of Postgres.
    """
    if not suspects:
        return
    before = _rows(connection, suspects)
    cards = snapshot.read_cards(ledger.client, suspects)
    on_their_way = {transition.job for transition in transition_log.unapplied(ledger)}
    after = _rows(connection, suspects)
    for job in suspects:
        row, card = before.get(job), cards.get(job)
        if row != after.get(job) or job in on_their_way:
            continue
        if not _differ(row, card):
            continue
        try:
            repaired = _repair(connection, ledger, job, row, card, result)
        except OperationalError as error:
            if not is_locked(error):
                raise
            # All others are repaired now, and this one by the next pass.
            logger.warning("job %s differs, and its row is locked: it is repaired later", job)
            continue
        if repaired is not None:
            stored, standing = row.state if row else "missing", card.state if card else "missing"
            result.note(f"{stored} in Postgres, {standing} in the ledger", repaired)


def _rows(connection: Connection, ids: Sequence[str]) -> dict[str, Row]:
    rows = connection.execute(_THESE, {"ids": list(ids)}) if ids else ()
    return {
        job: Row(job, name, seq, state, Token(epoch, attempt), *rest)
        for job, name, seq, state, epoch, attempt, *rest in rows
    }


def _repair(
    connection: Connection, ledger: Ledger, job: str, row: Row | None, card: JobCard | None, result: Reconciled
) -> bool | None:
    """Repair a job that differs; return whether that worked. None where work went on meanwhile."""
    is_open = card is not None and not card.is_tombstone
    if row is None or row.state in FINAL:
        return (is_open and card is not None and ledger.remove_job(job, card.token, final=True)) or None
    # A scheduled row that waits in the ledger has a newer message than the one that waits there.
    older = row.state == State.SCHEDULED and is_open and card is not None and card.state == State.WAITING
    if card is not None and is_newer(card, row) and not older:
        return _bring_forward(connection, ledger, row, card)
    if card is not None and is_open and not ledger.remove_job(job, card.token, final=False):
        return None
    if row.state == State.RUNNING:
        return _hold_again(connection, ledger, row, result)
    if row.state == State.ADMITTED:
        return _give_back(connection, ledger, row)
    # Scheduled rows come when they are due.
    return row.state in (State.SCHEDULED, State.REPLACED) or _submit(connection, ledger, job)


def _bring_forward(connection: Connection, ledger: Ledger, row: Row, card: JobCard) -> bool:
    """Bring a row of Postgres forward to the ledger, which is ahead and whose entry was lost."""
    fields = snapshot.read_jobs(ledger.client, [row.id]).get(row.id, {})
    token, step = rank_of(card)
    same = token == row.token
    ended = card.is_tombstone
    now = ledger.now_ms()
    # Close earlier attempts, whose ends were lost too. A step in the backlog comes after the last attempt.
    before = token.next() if step in (Step.FILED, Step.DROPPED) else token
    job_transitions.close_attempts(connection, row.id, before, now)
    forward = Transition(
        job=row.id,
        token=token,
        state=fields.get("became", State.CANCELLED.value) if ended else card.state,
        step=step,
        worker=(row.worker if ended and same else card.worker) or "",
        incarnation=(row.incarnation if ended and same else fields.get("incarnation")) or "",
        admitted_ms=row.admitted_ms if ended and same else int(fields.get("admitted") or 0),
        started_ms=row.started_ms if ended and same else int(fields.get("started") or 0),
        at_ms=now,
        losses=int(fields.get("losses") or 0),
        outcome=card.outcome or "",
        shape=card.shape or "",
    )
    return bool(job_transitions.apply(connection, [forward]))


def _submit(connection: Connection, ledger: Ledger, job: str) -> bool:
    pending = backlog.these(connection, [job])
    return bool(pending) and resubmit.submit_rows(ledger, pending, connection.engine) == 1


def _hold_again(connection: Connection, ledger: Ledger, row: Row, result: Reconciled) -> bool | None:
    """Enter a job that runs on a worker, by Postgres, into the book of that worker.

    Where the worker has left, or is another incarnation by now, the job is submitted again. Return None where the job
    has a key by now: its worker brought it back, or ended it.
    """
    if row.worker and row.incarnation:
        held = Adopted(
            row.id,
            row.token,
            filed_shape(row.shape, row.name),
            order(row.priority, row.seq),
            row.admitted_ms,
            row.started_ms,
            "",
            row.losses,
            row.rerun,
        )
        adopt = partial(ledger.adopt, row.worker, row.incarnation, [held])
        # A book that went missing together with the job comes back first: its worker may not have missed it yet.
        if not adopt() or (reconcile_indexes.restore_book(connection, ledger, row.worker, result) and not adopt()):
            return True
        if snapshot.read_cards(ledger.client, [row.id]):
            return None
    return _give_back(connection, ledger, row)


def _give_back(connection: Connection, ledger: Ledger, row: Row) -> bool:
    """End the attempt of a job and submit the job again; an attempt that had started is lost, perhaps the last."""
    attempt = claims.OpenAttempt(
        row.id,
        row.token,
        row.worker or "",
        row.incarnation or "",
        row.losses,
        row.rerun,
        row.admitted_ms,
        row.started_ms,
    )
    taken = claims.give_back(connection, [attempt], None, "the ledger did not know it", ledger.settings.most_losses)
    return any(applied.state in FINAL for applied in taken) or (bool(taken) and _submit(connection, ledger, row.id))
