"""A worker's heartbeat: the list of what it holds, and what the ledger makes of it."""

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
    """A heartbeat begins. (Only where it may change anything.)"""
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
    # One that is overtaken by a claim matters where the claim need not wait for it.
    overtaken = not rules.renewal_exclusive or state.common.faults.lost_answer > 0
    return overtaken and (card.worker == worker or card.state == WAITING)


def renew(state: State, rules: Rules, bounds: Bounds) -> Iterator[Step]:
    """lua/workers/renew.lua: what runs there and is not named is missing; what was missing before is taken back."""
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
    """Take back what a worker does not name; a worker that has it, or is being told of it, must not lose it so."""
    card = job.card
    assert card
    for one in job.held[worker]:
        if one.phase in (CLAIMED, HANDED, STARTED, RETURNED) and one[:2] == (card.epoch, card.attempt):
            raise Violation(f"a healthy worker's job is taken back: attempt {card.epoch}.{card.attempt}")
    return books.put_back(job, rules, bounds)


def time_passes(state: State, rules: Rules, bounds: Bounds) -> Iterator[Step]:
    """A renew interval, for a job that a list did not name: longer than an answer is waited for."""
    for index, job in enumerate(state.jobs):
        card = job.card
        if card and card.missing == MISSING and rules.held_by_time:
            me = state.workers[card.worker]
            if me.process == UP and (me.asking or me.list == LISTED):
                continue
            late = job._replace(card=card._replace(missing=MISSING_LONG))
            yield "a renew interval passes", index, card.worker, with_job(state, index, late)


def list_times_out(state: State, rules: Rules, bounds: Bounds) -> Iterator[Step]:
    """The worker waits for a heartbeat's answer no more, though the script may still be carried out."""
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
