"""Fetch waiting jobs that stay in Postgres, before the head of the backlog in the ledger runs out.

The ledger holds a bounded number of waiting jobs. Where it leaves one in Postgres, it notes the *border* of its shape:
no job of the shape that stays there comes before it. A job behind the border may not start, so order holds across it.
The runner of the duties fetches jobs in order, in these steps:

1. It tells the ledger that it begins. From then on the ledger notes the least order of the jobs that it leaves.
2. It marks the rows of jobs that were left before (`jobs.behind`). The row is durable before the ledger hears of its
   job, so all of them are there.
3. It takes the first rows of many shapes, which are `accepted` from then on, and reads the order of the next of each.
4. One script for each shape brings the jobs in, and moves the border to the next one, or to a job that was left since
   step 1. The scripts of several shapes go in one round trip.

A process that dies after step 3 leaves accepted rows behind the border. The next pass marks them again.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from sqlalchemy import Engine

from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.model.request import filed_shape
from celery_capacity.routing.policy.placement import order
from celery_capacity.routing.recovery import resubmit
from celery_capacity.routing.store import backlog
from celery_capacity.routing.store.backlog import Pending

#: Rows looked at, and marked, in one statement. Their order is that of the backlog, so each statement sorts all rows
#: that are not marked: many rows at once cost least.
MARK_CHUNK: Final = 5000
#: Most rows that are marked before jobs are fetched: a second or so of Postgres.
MARK_MOST: Final = 5000
#: Most jobs that one statement fetches, of all shapes that it asks for.
FETCH: Final = 1000
#: Most jobs that one script brings in: it takes some 1.5 ms, and no other caller waits for long.
CHUNK: Final = 50
#: Most shapes in one round trip: each costs Redis some 0.2 ms beside its jobs.
HEADS: Final = 8
#: Seconds after which a call ends. The duty is due again by then, and others have had their turn.
SECONDS: Final = 2.0

#: A shape, its border from now on, and jobs that are brought in, as `Ledger.refill_heads` takes them.
Head = tuple[str, int | None, list[tuple[Any, ...]]]


def refill(engine: Engine, ledger: Ledger) -> dict[str, int]:
    """Fetch jobs for all shapes whose heads run low.

    Counts: rows `marked` because their jobs stay in Postgres, `fetched` jobs.
    """
    counts = {"marked": 0, "fetched": 0}
    end = time.monotonic() + SECONDS
    while True:
        wanted = ledger.begin_refill()
        marked, unmarked_from = mark_left(engine, ledger, MARK_MOST)
        fetched = _fetch(engine, ledger, wanted, unmarked_from)
        counts["marked"] += marked
        counts["fetched"] += fetched
        is_done = not wanted and unmarked_from is None
        # Rows that others keep locked are fetched later.
        if is_done or not (marked or fetched) or time.monotonic() >= end:
            return counts


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
    engine: Engine, ledger: Ledger, wanted: Mapping[str, tuple[int, int | None]], unmarked_from: int | None
) -> int:
    """Fetch jobs of shapes, each as many as it wants before an order, and at most `FETCH`; return how many.

    `unmarked_from`: an order from which on rows of any shape are not marked yet, so that the borders stay before it.
    """
    fetched = 0
    for asked in _statements(wanted, unmarked_from):
        with engine.connect() as connection:
            rows = backlog.fetch(connection, asked)
            next_orders = backlog.next_orders(connection, list(asked))
        ledger.count_staying({shape: -len(taken) for shape, taken in rows.items()})
        late = set[str]()
        for heads in _round_trips(_heads(asked, rows, next_orders, unmarked_from)):
            in_time = [head for head in heads if head[0] not in late]
            answers = ledger.refill_heads(in_time) if in_time else []
            for (shape, _, jobs), answer in zip(in_time, answers, strict=True):
                if answer is None:
                    # Its border stays before these rows, which are marked again. Later rows would overtake them.
                    late.add(shape)
                else:
                    fetched += len(jobs)
    return fetched


def _statements(
    wanted: Mapping[str, tuple[int, int | None]], unmarked_from: int | None
) -> Iterator[dict[str, tuple[int, int | None]]]:
    """Yield the shapes that one statement asks for, with the number of jobs and the order before which they are."""
    asked: dict[str, tuple[int, int | None]] = {}
    jobs = 0
    for shape, (number, before) in wanted.items():
        most = min(number, FETCH)
        if asked and jobs + most > FETCH:
            yield asked
            asked, jobs = {}, 0
        asked[shape] = most, _least(before, unmarked_from)
        jobs += most
    if asked:
        yield asked


def _heads(
    asked: Iterable[str], rows: Mapping[str, list[Pending]], next_orders: Mapping[str, int], unmarked_from: int | None
) -> Iterator[Head]:
    """Yield the calls that bring in these rows: for each at most `CHUNK` of a shape, up to the next one."""
    for shape in asked:
        taken = rows.get(shape, [])
        for start in range(0, len(taken) or 1, CHUNK):
            chunk = taken[start : start + CHUNK]
            following = taken[start + CHUNK : start + CHUNK + 1]
            next_taken = order(following[0].priority, following[0].seq) if following else None
            border = _least(next_taken, next_orders.get(shape), unmarked_from)
            yield shape, border, [row.submission() for row in chunk]


def _round_trips(heads: Iterable[Head]) -> Iterator[list[Head]]:
    """Yield the calls that go together: few shapes, and at most `CHUNK` jobs."""
    together: list[Head] = []
    jobs = 0
    for head in heads:
        if together and (len(together) == HEADS or jobs + len(head[2]) > CHUNK):
            yield together
            together, jobs = [], 0
        together.append(head)
        jobs += len(head[2])
    if together:
        yield together


def _least(*orders: int | None) -> int | None:
    return min((number for number in orders if number is not None), default=None)


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
