"""A worker's heartbeat: the list of the jobs that it holds, and the ledger's reaction to the list."""

from __future__ import annotations

from collections.abc import Iterator

from tests.model import books
from tests.model.moves import Step, Violation, is_open, set_named, use, with_job, with_worker
from tests.model.state import (
    CLAIMED,
    HANDED,
    LISTED,
    LISTED_LATE,
    MISSING,
    MISSING_LONG,
    NAMED,
    NO_LIST,
    NOBODY,
    OPEN,
    OVER,
    RETURNED,
    RUNNING,
    STARTED,
    UP,
    WAITING,
    WORKERS,
    Bounds,
    Job,
    Rules,
    State,
)


def make_list(state: State, rules: Rules, bounds: Bounds) -> Iterator[Step]:
    """Begin a heartbeat, but only if it may change anything."""
    for worker in WORKERS:
        me = state.workers[worker]
        if me.process != UP or me.list != NO_LIST or me.book != OPEN or me.epoch != state.common.books:
            continue
        if (rules.renewal_exclusive and me.asking) or not is_open(state):
            continue
        if not any(_may_matter(state, job, worker, rules) for job in state.jobs):
            continue
        jobs = tuple(job._replace(named=set_named(job.named, worker, books.holds(job, worker))) for job in state.jobs)
        workers = with_worker(state, worker, me._replace(list=LISTED)).workers
        yield "a heartbeat's list is made", NOBODY, worker, State(state.common, workers, jobs)


def _may_matter(state: State, job: Job, worker: int, rules: Rules) -> bool:
    card = job.card
    if not card or card.state == OVER:
        return False
    if card.worker == worker and card.state == RUNNING:
        return card.missing != NAMED or not books.holds(job, worker)
    # A list that is overtaken by a claim matters if the claim need not wait for the list.
    overtaken = not rules.renewal_exclusive or state.common.faults.lost_answer > 0
    return overtaken and (card.worker == worker or card.state == WAITING)


def renew(state: State, rules: Rules, bounds: Bounds) -> Iterator[Step]:
    """Carry out a heartbeat (lua/workers/renew.lua).

    A job that runs there and is not named is missing. A job that was missing before is taken back.
    """
    for worker in WORKERS:
        me = state.workers[worker]
        if me.list == NO_LIST:
            continue
        jobs = state.jobs
        if is_open(state) and me.epoch == state.common.books and me.book == OPEN:
            jobs = tuple(_renewed(job, worker, state, rules, bounds) for job in jobs)
        jobs = tuple(job._replace(named=set_named(job.named, worker, False)) for job in jobs)
        workers = with_worker(state, worker, me._replace(list=NO_LIST)).workers
        yield "a heartbeat is carried out", NOBODY, worker, State(state.common, workers, jobs)


def _renewed(job: Job, worker: int, state: State, rules: Rules, bounds: Bounds) -> Job:
    card = job.card
    if not card or card.worker != worker or card.state != RUNNING:
        return job
    if job.named[worker]:
        return job._replace(card=card._replace(missing=NAMED))
    if card.missing == MISSING_LONG or (card.missing == MISSING and not rules.held_by_time):
        return taken_back(job, worker, state, rules, bounds)
    return job if card.missing else job._replace(card=card._replace(missing=MISSING))


def taken_back(job: Job, worker: int, state: State, rules: Rules, bounds: Bounds) -> Job:
    """Take back a job that a worker does not name.

    A worker that has the job, or is being told of it, must not lose it this way.
    """
    card = job.card
    assert card
    for attempt in job.held[worker]:
        if attempt.phase in (CLAIMED, HANDED, STARTED, RETURNED) and attempt[:2] == (card.epoch, card.attempt):
            raise Violation(f"a healthy worker's job is taken back: attempt {card.epoch}.{card.attempt}")
    return books.put_back(job, rules, bounds)


def time_passes(state: State, rules: Rules, bounds: Bounds) -> Iterator[Step]:
    """Let a renew interval pass for a job that a list did not name, longer than a caller waits for an answer."""
    for index, job in enumerate(state.jobs):
        card = job.card
        if card and card.missing == MISSING and rules.held_by_time:
            me = state.workers[card.worker]
            if me.process == UP and (me.asking or me.list == LISTED):
                continue
            late = job._replace(card=card._replace(missing=MISSING_LONG))
            yield "a renew interval passes", index, card.worker, with_job(state, index, late)


def list_times_out(state: State, rules: Rules, bounds: Bounds) -> Iterator[Step]:
    """Time out: the worker waits for a heartbeat's answer no more, though the script may still be carried out."""
    faults = use(state, "lost_answer")
    if faults is None:
        return
    for worker in WORKERS:
        me = state.workers[worker]
        if me.process == UP and me.list == LISTED:
            after = with_worker(state, worker, me._replace(list=LISTED_LATE))
            yield (
                "a heartbeat's answer times out",
                NOBODY,
                worker,
                after._replace(common=state.common._replace(faults=faults)),
            )
