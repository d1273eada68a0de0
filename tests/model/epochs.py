"""Steps in which Redis is lost, and the next epoch is opened."""

from __future__ import annotations

from collections.abc import Iterator

from tests.model import books
from tests.model.moves import Step, is_open, use, with_job, with_worker, without_submissions
from tests.model.state import (
    BEGUN,
    HOLDING,
    NO_BOOK,
    NOBODY,
    NOT_OPENING,
    OFF,
    RESERVED,
    RUNNING,
    WIPED,
    WORKERS,
    Bounds,
    Rules,
    State,
)


def empty(state: State, rules: Rules, bounds: Bounds) -> Iterator[Step]:
    """Empty Redis: it loses all of its data."""
    faults = use(state, "emptied")
    if faults is None or state.common.cold:
        return
    common = state.common._replace(faults=faults, cold=True, books=0)
    yield "Redis comes back empty", NOBODY, NOBODY, _without_stream(_wiped(state._replace(common=common)))


def restart(state: State, rules: Rules, bounds: Bounds) -> Iterator[Step]:
    """Restart Redis with all its data: the books are those of another life, and nobody uses them."""
    faults = use(state, "restarted")
    if faults is not None and not state.common.cold:
        after = state._replace(common=state.common._replace(faults=faults, cold=True))
        yield "Redis comes back with its data", NOBODY, NOBODY, after


def _without_stream(state: State) -> State:
    return state._replace(jobs=tuple(job._replace(entries=(), carried=False) for job in state.jobs))


def _wiped(state: State) -> State:
    """Return the state without cards, messages and books."""
    jobs = tuple(job._replace(card=(), messages=()) for job in state.jobs)
    workers = tuple(worker._replace(book=NO_BOOK) for worker in state.workers)
    return State(state.common, (workers[0], workers[1]), jobs)


def begin_opening(state: State, rules: Rules, bounds: Bounds) -> Iterator[Step]:
    """Begin the next epoch in Postgres, as an opener does, and apply the stream.

    Rows that somebody keeps locked are left out.
    """
    if state.common.cold and state.common.opening == NOT_OPENING:
        common = state.common._replace(epoch=state.common.epoch + 1, opening=BEGUN)
        jobs = tuple(books.write(job, job.entries, rules) if job.entries else job for job in state.jobs)
        yield "an opener begins the next epoch", NOBODY, NOBODY, state._replace(common=common, jobs=jobs)
        if jobs != state.jobs:
            yield "an opener begins it and finds rows locked", NOBODY, NOBODY, state._replace(common=common)


def wipe(state: State, rules: Rules, bounds: Bounds) -> Iterator[Step]:
    """Remove the old books, as the opener does."""
    if state.common.opening == BEGUN:
        after = _wiped(state._replace(common=state.common._replace(opening=WIPED)))
        if rules.stream_kept:
            after = after._replace(jobs=tuple(job._replace(carried=bool(job.entries)) for job in after.jobs))
        else:
            after = _without_stream(after)
        yield "an opener removes the old books", NOBODY, NOBODY, after


def fall_silent(state: State, rules: Rules, bounds: Bounds) -> Iterator[Step]:
    """Stop the opener for so long that another opener begins the epoch after.

    Later actions of the stopped opener are refused, or come first.
    """
    faults = use(state, "silent_opener")
    if faults is None or state.common.opening == NOT_OPENING:
        return
    stray = state.common.opening == BEGUN
    common = state.common._replace(opening=NOT_OPENING, stray_wipe=stray, faults=faults)
    yield "an opener is overtaken", NOBODY, NOBODY, state._replace(common=common)


def stray_wipe(state: State, rules: Rules, bounds: Bounds) -> Iterator[Step]:
    """Let the overtaken opener go on and remove books; its scan has passed the key of the epoch."""
    if state.common.stray_wipe:
        after = state._replace(common=state.common._replace(stray_wipe=False))
        newer = not state.common.cold or state.common.opening != NOT_OPENING
        done = after if rules.fenced_wipe and newer else _wiped(after)
        yield "an overtaken opener removes books", NOBODY, NOBODY, done


def open_epoch(state: State, rules: Rules, bounds: Bounds) -> Iterator[Step]:
    """Open the next epoch in Redis."""
    if state.common.opening == WIPED:
        epoch = state.common.epoch
        common = state.common._replace(books=epoch, cold=False, opening=NOT_OPENING, rebuilding=True)
        after = state._replace(common=common)
        yield "the next epoch is opened", NOBODY, NOBODY, without_submissions(after) if rules.rows_read_after else after


def reserve_book(state: State, rules: Rules, bounds: Bounds) -> Iterator[Step]:
    """Reserve closed books with the attempts that are held according to Postgres (`rebuild._reserve`).

    Attempts that no worker holds any more go back.
    """
    if not state.common.rebuilding or not is_open(state):
        return
    after = state._replace(common=state.common._replace(rebuilding=False))
    for worker in WORKERS:
        me = state.workers[worker]
        if me.process != OFF and not me.lost and me.book == NO_BOOK:
            after = with_worker(after, worker, me._replace(book=RESERVED))
    for index, job in enumerate(state.jobs):
        row = job.row
        if not row or row.state not in HOLDING or job.carried:
            continue
        if after.workers[row.worker].lost:
            job = job._replace(row=books.give_back(job, row, bounds))
        else:
            job, _ = books.adopt(job, row.worker, row[:2], row.losses, row.state == RUNNING)
        after = with_job(after, index, job)
    yield "books are reserved from Postgres", NOBODY, NOBODY, after
