"""Steps of the duties beside submitting: the stream is applied, tombstones expire, both stores are compared."""

from __future__ import annotations

from collections.abc import Iterator

from tests.model import books
from tests.model.moves import Step, is_open, with_job, without_submissions
from tests.model.state import NO_BOOK, NOBODY, OVER, Bounds, Rules, State


def apply_stream(state: State, rules: Rules, bounds: Bounds) -> Iterator[Step]:
    """Apply the stream: the duty writes its entries, and drops them from the stream."""
    for index, job in enumerate(state.jobs):
        if job.entries:
            yield "the stream is applied", index, NOBODY, with_job(state, index, books.write(job, job.entries, rules))


def expire(state: State, rules: Rules, bounds: Bounds) -> Iterator[Step]:
    """End the time of a tombstone.

    If the time began when Postgres had the end, each submission that read the row before has passed its deadline.
    """
    for index, job in enumerate(state.jobs):
        card = job.card
        if card and card.state == OVER and card.expiring:
            late = rules.submit_deadline and rules.tombstone_until_written
            gone = job._replace(card=(), submission=() if late else job.submission)
            yield "a tombstone expires", index, NOBODY, with_job(state, index, gone)


def reconcile(state: State, rules: Rules, bounds: Bounds) -> Iterator[Step]:
    """Compare ledger and row of a job without an entry, and make them equal; a carried job is let in then."""
    if state.common.rebuilding or not is_open(state):
        return
    homes = (state.workers[0].book != NO_BOOK, state.workers[1].book != NO_BOOK)
    for index, job in enumerate(state.jobs):
        if not job.row or job.entries:
            continue
        repaired = books.reconcile(job, homes, rules, bounds)._replace(carried=False)
        if repaired != job:
            after = with_job(state, index, repaired)
            if job.carried and rules.rows_read_after:
                after = without_submissions(after)
            yield "a job is reconciled", index, NOBODY, after
