"""Scheduled jobs whose time has come go to the ledger; jobs past their expiry end."""

from __future__ import annotations

from celery import Celery

from routing import backlog, enroll
from routing.states import State
from workers.control import end_before_start
from workers.stores import Stores

#: Rows looked at in one statement.
MOST = 1000


def run_once(app: Celery, stores: Stores) -> dict[str, int]:
    """Counts: `due` submitted, `expired` ended."""
    with stores.engine.connect() as connection:
        overdue = backlog.overdue(connection, MOST)
        rows = backlog.due(connection, MOST)
    expired = 0
    for job in overdue:
        if end_before_start(stores, job, State.EXPIRED, "expired"):
            app.backend.mark_as_revoked(job, "expired", store_result=True)
            expired += 1
    gone = set(overdue)
    return {
        "due": enroll.submit_rows(stores.ledger, [row for row in rows if row.id not in gone]),
        "expired": expired,
    }
