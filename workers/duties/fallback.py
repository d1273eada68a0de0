"""Duties while Postgres decides, without the ledger: workers are lost and jobs expire by their rows."""

from __future__ import annotations

import logging
from typing import Final

from celery import Celery
from sqlalchemy import Connection
from sqlalchemy.exc import OperationalError

from celery_capacity.routing.database.postgres_errors import is_locked
from celery_capacity.routing.model.states import State, WorkerStatus
from celery_capacity.routing.recovery import revocation
from celery_capacity.routing.store import backlog, claims, fencing, job_transitions, worker_rows
from celery_capacity.workers.duties import due
from celery_capacity.workers.process.stores import Stores, transactions
from celery_capacity.workers.results.deliver_later import deliver_rows
from celery_capacity.workers.supervision.window import Window

logger = logging.getLogger(__name__)

#: Rows read in one statement.
MAX_ROWS: Final = 1000


def expire(app: Celery, stores: Stores) -> dict[str, int]:
    """End jobs that expired or were only marked as revoked, and make jobs due whose constraints are met.

    Due jobs need nothing here: workers pull them as they are. Counts: `expired`, `revoked`, and those of
    `due.open_all`.
    """
    with stores.engine.connect() as connection:
        overdue = backlog.overdue(connection, MAX_ROWS)
        expired = [job for job in overdue if _end(connection, job, State.EXPIRED, "expired")]
        marked = [job for jobs in revocation.still_open(connection) for job in jobs]
        revoked = [job for job in marked if _end(connection, job, State.CANCELLED, job_transitions.REVOKED)]
    if expired or revoked:
        deliver_rows(app, stores, [*expired, *revoked])
    opened = due.open_all(app, stores)
    if opened["opened"] or opened["let_go"]:
        with stores.engine.connect() as connection:
            claims.wake(connection)
    return {"expired": len(expired), "revoked": len(revoked), **opened}


def _end(connection: Connection, job: str, state: State, error: str) -> bool:
    try:
        return backlog.end_unfiled(connection, job, state, error)
    except OperationalError as problem:
        if not is_locked(problem):
            raise
        logger.warning("job %s is to end as %s, and its row is locked: it ends later", job, state.value)
        return False


def lapse(app: Celery, stores: Stores, window: Window | None = None) -> dict[str, int]:
    """Mark workers that Postgres has not seen for the setting LOST as lost, and take back their jobs.

    Without a window, as by hand, the rows alone count. Counts: `lost` workers, `taken_back` jobs.
    """
    settings = stores.settings
    # A worker is seen once per renew interval. After a gap, each has the chance to be seen before it is given up.
    watched = window is None or window.seconds() >= min(settings.lost_after, settings.renew_interval * 2)
    with transactions(stores.engine).begin() as connection:
        if window is None:
            silent = list(worker_rows.silent_workers(connection, settings.lost_after))
        else:
            seen = worker_rows.silent_workers(connection, settings.worker_ttl)
            lately = bool(worker_rows.live_workers(connection, settings.worker_ttl))
            over = window.silent_for(settings.lost_after - settings.worker_ttl, seen, any_lately=lately)
            silent = over if watched else []
        for incarnation in silent:
            worker_rows.end_worker(connection, incarnation, WorkerStatus.LOST)
        fencing.close_orphans(connection)
        orphans = claims.orphans(connection)
        taken_back = claims.give_back_free(connection, orphans, None, "its worker has ended", settings.most_losses)
        if taken_back:
            claims.wake(connection)
    return {"lost": len(silent), "taken_back": len(taken_back)}
