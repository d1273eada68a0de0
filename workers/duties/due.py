"""Scheduled jobs whose time has come go to the ledger; jobs past their expiry end."""

from __future__ import annotations

import logging

from celery import Celery

from routing import backlog, enroll
from routing.errors import StoreUnavailable
from routing.postgres import is_locked
from routing.states import State
from workers.control import end_before_start
from workers.stores import Stores
from workers.undelivered import deliver_rows

logger = logging.getLogger(__name__)

#: Rows looked at in one statement.
MOST = 1000


def run_once(app: Celery, stores: Stores) -> dict[str, int]:
    """Counts: `due` submitted, `expired` ended."""
    with stores.engine.connect() as connection:
        overdue = backlog.overdue(connection, MOST)
    expired = 0
    for job in overdue:
        try:
            expired += end_before_start(stores, job, State.EXPIRED, "expired")
        except StoreUnavailable as error:
            if not is_locked(error):
                raise
            logger.warning("job %s has expired, and its row is locked: it ends later", job)
    if expired:
        deliver_rows(app, stores, overdue)
    return {"due": _due(stores, set(overdue)), "expired": expired}


def _due(stores: Stores, gone: set[str]) -> int:
    submitted, after = 0, 0
    while True:
        with stores.engine.connect() as connection:
            rows = backlog.due(connection, MOST, after)
        submitted += enroll.submit_rows(stores.ledger, [row for row in rows if row.id not in gone])
        if len(rows) < MOST:
            return submitted
        after = rows[-1].seq
