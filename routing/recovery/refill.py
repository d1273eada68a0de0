"""Fetch waiting jobs that stay in Postgres, before the head of the backlog in the ledger runs out.

The ledger holds a bounded number of waiting jobs. Where it leaves one in Postgres, it notes the *border* of its shape:
no job of the shape that stays there comes before it. A job behind the border may not start, so order holds across it.
The runner of the duties fetches jobs in order, in these steps:

1. It tells the ledger that it begins. From then on the ledger notes the least order of the jobs that it leaves.
2. It marks the rows of jobs that were left before (`jobs.behind`). The row is durable before the ledger hears of its
   job, so all of them are there.
3. It takes the first rows of a shape, which are `accepted` from then on, and reads the order of the next one.
4. One script brings the jobs in, and moves the border to the next one, or to a job that was left since step 1.

A process that dies after step 3 leaves accepted rows behind the border. The next pass marks them again.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import Engine

from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.model.request import filed_shape
from celery_capacity.routing.policy.placement import order
from celery_capacity.routing.recovery import resubmit
from celery_capacity.routing.store import backlog

#: Rows looked at, and marked, in one statement. Their order is that of the backlog, so each statement sorts all rows
#: that are not marked: many rows at once cost least.
MARK_CHUNK: Final = 5000
#: Most rows that are marked before jobs are fetched: a second or so of Postgres.
MARK_MOST: Final = 5000
#: Most jobs of one shape that are fetched before those of the next shape.
FETCH: Final = 1000
#: Passes of one call. Heads that run low meanwhile are asked for again.
MAX_PASSES: Final = 10


def refill(engine: Engine, ledger: Ledger) -> dict[str, int]:
    """Fetch jobs for all shapes whose heads run low.

    Counts: rows `marked` because their jobs stay in Postgres, `fetched` jobs.
    """
    marked = fetched = 0
    for _ in range(MAX_PASSES):
        wanted = ledger.begin_refill()
        number, unmarked_from = mark_left(engine, ledger, MARK_MOST)
        marked += number
        for shape, (jobs, before) in wanted.items():
            fetched += _fetch(engine, ledger, shape, jobs, before, unmarked_from)
        if not wanted and unmarked_from is None:
            break
    return {"marked": marked, "fetched": fetched}


def mark_left(engine: Engine, ledger: Ledger, most: int | None = None) -> tuple[int, int | None]:
    """Mark the rows of jobs that the ledger left in Postgres, about `most` of them.

    Returns how many, and the least order of the rows that were not looked at, None where all were.
    """
    borders = ledger.borders()
    marked, after, more = 0, (-10, 0), bool(borders)
    while more:
        if most is not None and marked >= most:
            return marked, order(-after[0], after[1]) + 1
        with engine.connect() as connection:
            rows = backlog.unmarked(connection, MARK_CHUNK, after)
        beyond = {row.id: row for row in rows if _is_beyond(ledger, borders, row)}
        marked += resubmit.mark(engine, ledger, [beyond[job] for job in ledger.unknown(list(beyond))])
        more = len(rows) == MARK_CHUNK
        after = (-rows[-1].priority, rows[-1].seq) if rows else after
    return marked, None


def _is_beyond(ledger: Ledger, borders: dict[str, int], row: backlog.Place) -> bool:
    border = borders.get(ledger.shape_held(filed_shape(row.shape, row.name), row.losses))
    return border is not None and order(row.priority, row.seq) >= border


def _fetch(
    engine: Engine, ledger: Ledger, shape: str, wanted: int, before: int | None, unmarked_from: int | None
) -> int:
    """Fetch jobs of a shape, as many as it wants before an order, and at most `FETCH`; return how many.

    `unmarked_from`: an order from which on rows of any shape are not marked yet, so that the border stays before it.
    """
    fetched, left = 0, min(wanted, FETCH)
    while left > 0:
        with engine.connect() as connection:
            if unmarked_from is not None and (backlog.next_order(connection, shape) or unmarked_from) >= unmarked_from:
                break
            most = min(left, resubmit.CHUNK)
            rows = backlog.fetch(connection, shape, most, before)
            next_order = backlog.next_order(connection, shape)
        ledger.count_staying({shape: -len(rows)} if rows else {})
        border = min((least for least in (next_order, unmarked_from) if least is not None), default=None)
        if ledger.refill(shape, border, [row.submission() for row in rows]) is None:
            break
        fetched += len(rows)
        left -= len(rows)
        if next_order is None or len(rows) < most:
            break
    return fetched


def restore_borders(engine: Engine, ledger: Ledger) -> int:
    """Tell the ledger of all jobs that stay in Postgres; return how many."""
    ledger.begin_refill()
    mark_left(engine, ledger)
    with engine.connect() as connection:
        staying = backlog.staying(connection)
    for shape, _, first in staying:
        ledger.refill(shape, first, [])
    for shape in ledger.borders().keys() - {shape for shape, *_ in staying}:
        ledger.refill(shape, None, [])
    ledger.count_staying({shape: number for shape, number, _ in staying}, absolute=True)
    return sum(number for _, number, _ in staying)
