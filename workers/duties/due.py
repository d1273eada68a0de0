"""End expired jobs, make jobs due whose constraints are met, and submit scheduled jobs whose time has come."""

from __future__ import annotations

import logging

from celery import Celery

from celery_capacity.routing.database.postgres_errors import is_locked
from celery_capacity.routing.errors import StoreUnavailable
from celery_capacity.routing.insert import key_limits
from celery_capacity.routing.model.states import State
from celery_capacity.routing.recovery import resubmit
from celery_capacity.routing.store import backlog, dependencies
from celery_capacity.workers.duties import apply_transitions
from celery_capacity.workers.process.stores import Stores
from celery_capacity.workers.results.cancellation import end_before_start, lift_constraints
from celery_capacity.workers.results.deliver_later import deliver_rows
from celery_capacity.workers.submit.constraints import burst_of

logger = logging.getLogger(__name__)

#: Rows read in one statement.
MAX_ROWS = 1000


def run_once(app: Celery, stores: Stores) -> dict[str, int]:
    """End expired jobs, make jobs due whose constraints are met, and submit due jobs to the ledger.

    Counts: `expired` and `cancelled` jobs that ended, `opened` jobs whose constraints are met, jobs `let_go` by their
    rate or their keys, `due` jobs submitted.
    """
    with stores.engine.connect() as connection:
        overdue = backlog.overdue(connection, MAX_ROWS)
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
    opened = open_all(app, stores)
    return {"expired": expired, **opened, "due": _due(app, stores, set(overdue))}


def open_all(app: Celery, stores: Stores) -> dict[str, int]:
    """Set the due time of jobs whose constraints are met now, whether Postgres or the ledger decides starts.

    Counts: `opened`, `cancelled`, `let_go`.
    """
    opened = lift_constraints(app, stores)
    burst = burst_of(stores.settings)
    with stores.engine.connect() as connection:
        let_go = dependencies.let_go(connection, burst)
    let_go += len(key_limits.open_all(stores.engine, burst))
    return {
        "opened": len(opened.due) + len(opened.scheduled),
        "cancelled": len(opened.cancelled),
        "let_go": let_go,
    }


def _due(app: Celery, stores: Stores, gone: set[str]) -> int:
    if stores.ledger.is_unfinished():
        # The process that opens the ledger knows which jobs may have started (`routing.policy.unknown_starts`).
        return 0
    submitted, after = 0, 0
    with stores.engine.connect() as connection:
        if not backlog.due(connection, 1):
            return 0
    # A job that has started already is not due: see `sweep`.
    apply_transitions.run_once(app, stores, older_than_ms=0)
    while True:
        with stores.engine.connect() as connection:
            rows = backlog.due(connection, MAX_ROWS, after)
        submitted += resubmit.submit_rows(stores.ledger, [row for row in rows if row.id not in gone])
        if len(rows) < MAX_ROWS:
            return submitted
        after = rows[-1].seq
