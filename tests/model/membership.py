"""Steps in which workers join, are lost and come back."""

from __future__ import annotations

from collections.abc import Iterator

from tests.model import books
from tests.model.heartbeats import taken_back
from tests.model.moves import Step, is_open, set_named, use, with_job, with_worker
from tests.model.state import (
    DEAD,
    DISOWNED,
    HOLDING,
    LISTED,
    NO_BOOK,
    NO_LIST,
    NOBODY,
    OFF,
    OPEN,
    PAUSED,
    RETURNED,
    RUNNING,
    STARTED,
    STEP_RUNNING,
    UP,
    WORKERS,
    Bounds,
    Held,
    Job,
    Record,
    Rules,
    State,
    Worker,
)


def register(state: State, rules: Rules, bounds: Bounds) -> Iterator[Step]:
    """Let the second worker join."""
    if not is_open(state):
        return
    for worker in WORKERS:
        if state.workers[worker].process == OFF:
            me = Worker(UP, state.common.books, OPEN, False, False, False, NO_LIST)
            yield "a worker joins", NOBODY, worker, with_worker(state, worker, me)


def rejoin(state: State, rules: Rules, bounds: Bounds) -> Iterator[Step]:
    """Register a worker again that sees a new epoch or has no book; it reports its jobs (`Membership.rejoin`)."""
    if not is_open(state):
        return
    for worker in WORKERS:
        me = state.workers[worker]
        if me.process != UP or me.asking or (rules.renewal_exclusive and me.list == LISTED):
            continue
        if me.epoch == state.common.books and me.book == OPEN:
            continue
        if rules.rejoin_after_written and any(job.pending[worker] for job in state.jobs):
            continue
        after = with_worker(state, worker, me._replace(epoch=state.common.books, book=OPEN, lost=False))
        for index, job in enumerate(state.jobs):
            after = with_job(after, index, _said(job, worker, after, rules, bounds))
        yield "a worker joins again", NOBODY, worker, after


def _said(job: Job, worker: int, state: State, rules: Rules, bounds: Bounds) -> Job:
    """Enter a worker's report of a job when it joins again; a job that it does not name is taken back."""
    held = list(job.held[worker])
    for number, attempt in enumerate(held):
        if attempt.phase not in (STARTED, RETURNED):
            continue
        job, adopted = books.adopt(job, worker, attempt[:2], _losses(job, attempt), True)
        if adopted:
            record = Record(attempt.epoch, attempt.attempt, STEP_RUNNING, RUNNING, 0, worker)
            job = books.with_pending(job, worker, (*job.pending[worker], record))
        else:
            held[number] = attempt._replace(phase=DISOWNED)
    # The end of a disowned attempt is refused, so nothing of a disowned attempt that has returned is left.
    returned = {attempt[:2] for attempt in job.held[worker] if attempt.phase == RETURNED}
    job = books.with_held(
        job, worker, [attempt for attempt in held if attempt.phase != DISOWNED or attempt[:2] not in returned]
    )
    card = job.card
    if card and card.state == RUNNING and card.worker == worker and not books.holds(job, worker):
        return taken_back(job, worker, state, rules, bounds)
    return job


def _losses(job: Job, held: Held) -> int:
    return job.row.losses if job.row else 0


def crash(state: State, rules: Rules, bounds: Bounds) -> Iterator[Step]:
    """Crash a worker: its machine is gone, with all of its memory."""
    faults = use(state, "crash")
    if faults is None:
        return
    for worker in WORKERS:
        me = state.workers[worker]
        if me.process not in (UP, PAUSED):
            continue
        jobs = tuple(
            books.with_pending(books.with_held(job, worker, ()), worker, ())._replace(
                named=set_named(job.named, worker, False)
            )
            for job in state.jobs
        )
        gone = Worker(DEAD, me.epoch, me.book, me.lost, False, False, NO_LIST)
        workers = with_worker(state, worker, gone).workers
        yield "a worker crashes", NOBODY, worker, State(state.common._replace(faults=faults), workers, jobs)


def stop(state: State, rules: Rules, bounds: Bounds) -> Iterator[Step]:
    """Stop a worker with all its processes (SIGSTOP, a frozen machine)."""
    faults = use(state, "pause")
    if faults is None:
        return
    for worker in WORKERS:
        me = state.workers[worker]
        if me.process == UP:
            after = with_worker(state, worker, me._replace(process=PAUSED))
            yield "a worker is stopped", NOBODY, worker, after._replace(common=state.common._replace(faults=faults))


def go_on(state: State, rules: Rules, bounds: Bounds) -> Iterator[Step]:
    """Let a stopped worker go on, as if no time had passed."""
    for worker in WORKERS:
        me = state.workers[worker]
        if me.process == PAUSED:
            yield "a stopped worker goes on", NOBODY, worker, with_worker(state, worker, me._replace(process=UP))


def lapse(state: State, rules: Rules, bounds: Bounds) -> Iterator[Step]:
    """Give up a worker as LOST in Postgres, and take back its jobs (`takeback.take_back`).

    Postgres has all of the stream then.
    """
    if not is_open(state):
        return
    for worker in WORKERS:
        me = state.workers[worker]
        if me.process not in (PAUSED, DEAD) or me.book == NO_BOOK:
            continue
        after = with_worker(state, worker, me._replace(book=NO_BOOK, lost=True))
        for index, job in enumerate(state.jobs):
            if job.entries:
                job = books.write(job, job.entries, rules)
            if job.card and job.card.worker == worker and job.card.state in HOLDING:
                job = books.put_back(job, rules, bounds)
            messages = tuple(message for message in job.messages if message[0] != worker)
            after = with_job(after, index, job._replace(messages=messages))
        yield "a silent worker is lost", NOBODY, worker, after
