"""Close workers whose leases ran out at once, and take back their jobs when the workers are LOST."""

from __future__ import annotations

import logging

from celery import Celery
from sqlalchemy.exc import DBAPIError

from celery_capacity.routing.config import process_identity
from celery_capacity.routing.database.postgres_errors import is_locked, one_line
from celery_capacity.routing.ledger.replies import LapseVerdict
from celery_capacity.routing.recovery import reclaim
from celery_capacity.routing.store import worker_rows
from celery_capacity.routing.store.refused_transitions import concerns_data
from celery_capacity.workers.membership import orphans
from celery_capacity.workers.process.stores import Stores
from celery_capacity.workers.supervision.window import Window

logger = logging.getLogger(__name__)


def run_once(app: Celery, stores: Stores, window: Window | None = None) -> dict[str, int]:
    """Close workers whose leases ran out, and take back the jobs of lost workers.

    Without a window, as by hand, the lease alone counts. Counts: `closed` and `lost` workers, `taken_back` jobs.
    """
    settings = stores.settings
    grace_ms = round((settings.lost_after - settings.worker_ttl) * 1000)
    # A worker renews within the renew interval. After a gap, each has the chance to be seen before it is given up.
    watched = window is None or window.seconds() >= min(settings.lost_after, settings.renew_interval * 2)
    closed = lost = taken = 0
    for worker in stores.ledger.lapsed_workers():
        lapsed = stores.ledger.lapse(worker, grace_ms, settings.most_losses, most=0)
        closed += lapsed.verdict is LapseVerdict.CLOSED
        if watched and lapsed.verdict is LapseVerdict.DUE and lapsed.incarnation:
            with stores.engine.connect() as connection:
                row = worker_rows.find_worker(connection, lapsed.incarnation)
            orphans.see_to(row, process_identity.pid_space())
            try:
                given_up = reclaim.take_back(stores.engine, stores.ledger, worker, lapsed.incarnation, grace_ms)
            except DBAPIError as error:
                if not (is_locked(error) or concerns_data(error)):
                    raise
                # The worker hangs within a commit (`routing.store.fencing`), which the server ends some time, or a row
                # is damaged. The other workers do not wait.
                logger.warning(
                    "worker %s is lost, but Postgres takes no write of its jobs: they are taken back later: %s",
                    *(worker, one_line(error)),
                )
                continue
            taken += given_up.taken_back
            lost += given_up.verdict is LapseVerdict.GONE
    return {"closed": closed, "lost": lost, "taken_back": taken}
