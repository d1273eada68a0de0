"""The scripts of the ledger and the statements of Postgres, on the values of the model.

Each function is one atomic step on one job. It has the name of the script in routing/lua or of the function in
routing/.
"""

from __future__ import annotations

from collections.abc import Iterable

from tests.model.state import (
    ACCEPTED,
    ADMITTED,
    DISOWNED,
    FINAL,
    HOLDING,
    LOST,
    NAMED,
    NOBODY,
    OPEN,
    OVER,
    REFUSED,
    RETURNED,
    RUNNING,
    STARTED,
    STEP_ADMITTED,
    STEP_BACK,
    STEP_ENDED,
    STEP_FILED,
    STEP_RUNNING,
    SUCCEEDED,
    WAITING,
    Bounds,
    Card,
    Held,
    Job,
    Record,
    Rules,
    State,
)


def note(job: Job, record: Record) -> tuple[Record, ...]:
    """Return the stream with an entry, which replaces the entry of the same attempt (lua/lib/transitions.lua)."""
    span = record.attempt + (record.step == STEP_FILED)
    kept = (
        entry
        for entry in job.entries
        if (entry.epoch, entry.attempt + (entry.step == STEP_FILED)) != (record.epoch, span)
    )
    return tuple(sorted((*kept, record)))


def has_room(state: State, worker: int) -> bool:
    """Return True if by the books a job fits on the worker.

    A job does not fit either if its worker would hand it back at once, because bodies run there that the books do not
    know.
    """
    if state.workers[worker].book != OPEN:
        return False
    for job in state.jobs:
        card = job.card
        if card and card.worker == worker and card.state in HOLDING:
            return False
        if any(attempt.phase in (STARTED, DISOWNED) for attempt in job.held[worker]):
            return False
    return True


def admit(job: Job, epoch: int, attempt: int, losses: int, worker: int) -> Job:
    """Allocate, note and deliver a job (`grant`)."""
    card = Card(ADMITTED, epoch, attempt, worker, losses, False, True, NAMED, NOBODY, False)
    record = Record(epoch, attempt, STEP_ADMITTED, ADMITTED, losses, worker)
    return job._replace(
        card=card, entries=note(job, record), messages=tuple(sorted((*job.messages, (worker, epoch, attempt))))
    )


def hand_over(job: Job, worker: int, epoch: int) -> Job:
    """Admit a waiting job to the worker that asks, with the lease (`hand_over`)."""
    card = job.card
    assert card
    attempt = card.attempt + 1
    taken = Card(RUNNING, epoch, attempt, worker, card.losses, True, True, NAMED, NOBODY, False)
    return job._replace(
        card=taken, entries=note(job, Record(epoch, attempt, STEP_RUNNING, RUNNING, card.losses, worker))
    )


def file(job: Job, epoch: int, attempt: int, losses: int) -> Job:
    """File a job into the backlog (`file`)."""
    card = Card(WAITING, epoch, attempt, NOBODY, losses, False, True, NAMED, NOBODY, False)
    return job._replace(card=card, entries=note(job, Record(epoch, attempt, STEP_FILED, WAITING, losses, NOBODY)))


def is_known(job: Job, attempt: int, rules: Rules) -> bool:
    """Return True if a submission finds a job that it must leave as it is (`admit_or_file`).

    `attempt`: the attempt of the row that the submission read.
    """
    card = job.card
    if not card:
        return job.carried
    if card.state != OVER or (rules.tombstone_until_written and not card.expiring):
        return True
    return card.attempt > attempt or (card.became in FINAL and card.attempt != attempt)


def tombstone(card: Card, became: int) -> Card:
    """Return the tombstone of a job that the ledger has no more; its time does not run yet."""
    return Card(OVER, card.epoch, card.attempt, NOBODY, 0, False, False, NAMED, became, False)


def bury(job: Job, became: int, rules: Rules) -> Card:
    """Return the tombstone of an attempt that ends now (`bury`)."""
    assert job.card
    return tombstone(job.card, became)._replace(expiring=not rules.tombstone_until_written)


def end(job: Job, rules: Rules) -> Job:
    """Give back the allocation of an attempt that succeeded (lua/jobs/release.lua)."""
    card = job.card
    assert card
    entries = note(job, Record(card.epoch, card.attempt, STEP_ENDED, SUCCEEDED, card.losses, card.worker))
    return job._replace(card=bury(job, SUCCEEDED, rules), entries=entries)


def put_back(job: Job, rules: Rules, bounds: Bounds) -> Job:
    """Take an attempt back into the backlog, or to Postgres if its message is there, or end it as lost (`put_back`)."""
    card = job.card
    assert card
    losses = card.losses + card.started
    if card.started and (not job.rerun or losses >= bounds.most_losses):
        record = Record(card.epoch, card.attempt, STEP_ENDED, LOST, losses, card.worker)
        return job._replace(card=bury(job, LOST, rules), entries=note(job, record))
    return back(job, card, losses)


def back(job: Job, card: Card, losses: int) -> Job:
    """Put a job into the backlog if its message is here, else back to Postgres."""
    state = WAITING if card.message else ACCEPTED
    waiting = Card(WAITING, card.epoch, card.attempt, NOBODY, losses, False, True, NAMED, NOBODY, False)
    entries = note(job, Record(card.epoch, card.attempt, STEP_BACK, state, losses, NOBODY))
    return job._replace(card=waiting if card.message else tombstone(card, ACCEPTED), entries=entries)


def adopt(job: Job, worker: int, token: tuple[int, int], losses: int, started: bool) -> tuple[Job, bool]:
    """Enter an attempt that a worker holds since an older epoch (lua/workers/adopt.lua).

    Return False if another attempt has the job.
    """
    card, (epoch, attempt) = job.card, token
    entries = job.entries
    if card and card.attempt < attempt and (card.state == WAITING or (card.state == OVER and card.became not in FINAL)):
        if card.state == WAITING:
            entries = tuple(entry for entry in entries if entry.epoch != card.epoch or entry.attempt != card.attempt)
        card = ()
    if not card:
        held = Card(RUNNING, epoch, attempt, worker, losses, started, False, NAMED, NOBODY, False)
        return job._replace(card=held, entries=entries), True
    mine = card.state in HOLDING and (card.epoch, card.attempt, card.worker) == (epoch, attempt, worker)
    return job, mine


def apply(row: Record | tuple[()], records: Iterable[Record]) -> Record | tuple[()]:
    """Return the row after the newest transition (`store.apply`).

    A final state has no exit, and a rank only grows.
    """
    newest = max(records, default=None)
    if not row or newest is None or row.state in FINAL or newest[:3] <= row[:3]:
        return row
    return newest


def write(job: Job, records: Iterable[Record], rules: Rules) -> Job:
    """Write transitions to Postgres, then acknowledge their entries; the tombstone expires (`transition_log`)."""
    row = apply(job.row, records)
    assert row
    over = row.state in FINAL
    entries = tuple(entry for entry in job.entries if not over and entry[:3] > row[:3])
    card = job.card
    if card and card.state == OVER and not card.expiring and not entries:
        card = card._replace(expiring=True)
    return job._replace(row=row, entries=entries, card=card)


def _rank(card: Card) -> tuple[int, int, int]:
    if card.state == OVER:
        return card.epoch, card.attempt, STEP_ENDED if card.became in FINAL else STEP_BACK
    step = {WAITING: STEP_FILED, ADMITTED: STEP_ADMITTED, RUNNING: STEP_RUNNING}[card.state]
    return card.epoch, card.attempt, step


def reconcile(job: Job, homes: tuple[bool, bool], rules: Rules, bounds: Bounds) -> Job:
    """Make the ledger equal Postgres for a job without an entry (`reconcile._repair`).

    `homes`: workers with a book. A waiting job that is not in the ledger is submitted, which is a step of its own.
    """
    row, card = job.row, job.card
    if not row:
        return job
    if row.state in FINAL:
        return (
            job._replace(card=tombstone(card, row.state)._replace(expiring=True))
            if card and card.state != OVER
            else job
        )
    if card and card.state != OVER and card[1:3] == row[:2] and card.state == row.state:
        return job
    if card and _rank(card) > row[:3] and card.attempt >= row.attempt:
        became = card.became if card.state == OVER else card.state
        holder = card.worker if card.state in HOLDING else NOBODY
        return job._replace(row=Record(*_rank(card), became, max(row.losses, card.losses), holder))
    if row.state not in HOLDING:
        return job._replace(card=()) if card and card.state != OVER else job
    job = job._replace(card=())
    if row.state == RUNNING and homes[row.worker]:
        return adopt(job, row.worker, row[:2], row.losses, True)[0]
    return job._replace(row=give_back(job, row, bounds))


def give_back(job: Job, row: Record, bounds: Bounds) -> Record:
    """End an open attempt that nobody holds any more (`pull.give_back`)."""
    losses = row.losses + (row.state == RUNNING)
    if row.state == RUNNING and (not job.rerun or losses >= bounds.most_losses):
        return Record(row.epoch, row.attempt, STEP_ENDED, LOST, losses, row.worker)
    return Record(row.epoch, row.attempt, STEP_BACK, ACCEPTED, losses, NOBODY)


def holds(job: Job, worker: int) -> bool:
    """Return True if a heartbeat's list names the job.

    A worker names the jobs that it runs, and the jobs that it has not released yet.
    """
    return any(attempt.phase in (STARTED, RETURNED, REFUSED) for attempt in job.held[worker])


def with_held(job: Job, worker: int, held: Iterable[Held]) -> Job:
    both = list(job.held)
    both[worker] = tuple(sorted(held))
    return job._replace(held=(both[0], both[1]))


def with_pending(job: Job, worker: int, pending: Iterable[Record]) -> Job:
    both = list(job.pending)
    both[worker] = tuple(sorted(set(pending)))
    return job._replace(pending=(both[0], both[1]))
