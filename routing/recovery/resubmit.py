"""Bring rows to the ledger: jobs that are durable and that the books should have."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Final

from sqlalchemy import Engine

from celery_capacity.routing.insert import key_limits
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.ledger.replies import LedgerFull
from celery_capacity.routing.model.request import filed_shape
from celery_capacity.routing.store import backlog, dependencies
from celery_capacity.routing.store.backlog import Pending, Place
from celery_capacity.routing.store.job_transitions import Applied

logger = logging.getLogger(__name__)

#: Jobs submitted in one step. A step takes some 2 ms, so no other caller waits for long.
CHUNK: Final = 100


def submit_rows(ledger: Ledger, rows: Sequence[Pending], engine: Engine | None = None) -> int:
    """Submit rows in their order; return how many the ledger took.

    It had the other jobs already, left them in Postgres, or is full. The duty `refill` marks the rows of jobs that were
    left. Where they wait already, as in a rebuild, an `engine` is needed, and they are marked here. Jobs for which a
    full ledger has no room are durable, and the next sweep brings them.
    """
    taken = 0
    for start in range(0, len(rows), CHUNK):
        chunk = rows[start : start + CHUNK]
        try:
            brought = ledger.bring([row.submission() for row in chunk])
        except LedgerFull as error:
            logger.warning("%d jobs wait until Redis has room: %s", len(rows) - start, error)
            return taken
        taken += brought.taken
        if engine is not None and brought.left:
            mark(engine, ledger, [chunk[number] for number in brought.left], waiting=True)
    return taken


def mark(engine: Engine, ledger: Ledger, rows: Sequence[Pending | Place], *, waiting: bool = False) -> int:
    """Mark rows of jobs that stay in Postgres, and have the ledger count them; return how many."""
    shapes = {row.id: ledger.shape_held(filed_shape(row.shape, row.name), row.losses) for row in rows}
    with engine.connect() as connection:
        marked = backlog.mark_behind(connection, shapes, waiting=waiting)
    ledger.count_staying(marked)
    return marked.total()


def go_on(engine: Engine, ledger: Ledger, applied: Sequence[Applied]) -> int:
    """Submit at once the jobs that may start after these ends; return how many the ledger took.

    Some have an attempt that ended with a due successor, such as a retry without a countdown. Others waited for one of
    the ended jobs, or for one of its keys. Jobs that are cancelled by such an end are announced.
    """
    due, opened = [row.job for row in applied if row.due], dependencies.Opened()
    if any(row.awaited for row in applied):
        opened = dependencies.open_needs(engine)
        due += opened.due
    if any(row.limited or row.awaited for row in applied):
        due += key_limits.open_noted(engine)
    rows: list[Pending] = []
    if due:
        with engine.connect() as connection:
            rows = backlog.these(connection, due)
    taken = submit_rows(ledger, rows)
    if opened.cancelled:
        ledger.announce(opened.cancelled)
    return taken
