"""Steps in which jobs come in: the caller's insert, the submission of a row, and admissions."""

from __future__ import annotations

from collections.abc import Iterator

from tests.model import books
from tests.model.moves import Step, is_open, use, with_job
from tests.model.state import ACCEPTED, ADMITTED, NOBODY, STEP_NONE, UP, WAITING, WORKERS, Bounds, Record, Rules, State


def accept(state: State, rules: Rules, bounds: Bounds) -> Iterator[Step]:
    """Commit a caller's insert."""
    for index, job in enumerate(state.jobs):
        if not job.row:
            row = Record(0, 0, STEP_NONE, ACCEPTED, 0, NOBODY)
            yield "a job is accepted", index, NOBODY, with_job(state, index, job._replace(row=row))


def read_row(state: State, rules: Rules, bounds: Bounds) -> Iterator[Step]:
    """Read the row, as each submitter does: the caller, the sweep, the listener.

    The opener and reconcile read the row of a waiting job.
    """
    if rules.reports_first and any(_is_unreported(state, worker) for worker in WORKERS):
        return
    for index, job in enumerate(state.jobs):
        row = job.row
        if not row or job.submission:
            continue
        unfiled = row.state == WAITING and not job.card and not job.entries
        if row.state == ACCEPTED or unfiled:
            sent = job._replace(submission=(row.attempt, row.losses))
            yield "its row is read to submit it", index, NOBODY, with_job(state, index, sent)


def _is_unreported(state: State, worker: int) -> bool:
    """Return True if a live worker has not reported its jobs yet in the epoch that is open."""
    me = state.workers[worker]
    return me.process == UP and me.epoch != state.common.epoch


def submit(state: State, rules: Rules, bounds: Bounds) -> Iterator[Step]:
    """Submit a row to any worker with room, or into the backlog, or lose the submission (lua/jobs/submit.lua)."""
    for index, job in enumerate(state.jobs):
        if not job.submission:
            continue
        attempt, losses = job.submission
        epoch = state.common.books
        arrived = job._replace(submission=())
        yield "a submission is lost", index, NOBODY, with_job(state, index, arrived)
        if not is_open(state) or books.is_known(job, attempt, rules):
            continue
        waits = any(other.card and other.card.state == WAITING for other in state.jobs)
        rooms = [] if waits else [worker for worker in WORKERS if books.has_room(state, worker)]
        for worker in rooms:
            taken = books.admit(arrived, epoch, attempt + 1, losses, worker)
            yield "a submission is admitted", index, worker, with_job(state, index, taken)
        if not rooms:
            yield (
                "a submission is filed",
                index,
                NOBODY,
                with_job(state, index, books.file(arrived, epoch, attempt, losses)),
            )


def fill(state: State, rules: Rules, bounds: Bounds) -> Iterator[Step]:
    """Admit a waiting job where there is room (lua/backlog/fill.lua)."""
    if not is_open(state):
        return
    for worker in WORKERS:
        if not books.has_room(state, worker):
            continue
        for index, job in enumerate(state.jobs):
            card = job.card
            if card and card.state == WAITING:
                taken = books.admit(job, state.common.books, card.attempt + 1, card.losses, worker)
                yield "a waiting job is admitted", index, worker, with_job(state, index, taken)


def redeliver(state: State, rules: Rules, bounds: Bounds) -> Iterator[Step]:
    """Deliver a message again: START is over, though the message may only be late (lua/jobs/redeliver.lua)."""
    faults = use(state, "redelivery")
    if faults is None or not is_open(state):
        return
    for index, job in enumerate(state.jobs):
        card = job.card
        if card and card.state == ADMITTED:
            messages = tuple(sorted((*job.messages, (card.worker, card.epoch, card.attempt))))
            after = with_job(state, index, job._replace(messages=messages))
            after = after._replace(common=state.common._replace(faults=faults))
            yield "a message is delivered again", index, card.worker, after
