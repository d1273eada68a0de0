"""Workers whose leases ran out are closed at once, and lose their jobs when they are LOST."""

from __future__ import annotations

import logging

from celery import Celery
from sqlalchemy.exc import DBAPIError

from celery_capacity.routing.config import process_identity
from celery_capacity.routing.database.postgres import is_locked, told
from celery_capacity.routing.recovery import reclaim
from celery_capacity.routing.store import worker_rows
from celery_capacity.routing.store.refused_transitions import concerns_data
from celery_capacity.workers.duties.window import Window
from celery_capacity.workers.membership import orphans
from celery_capacity.workers.process.stores import Stores

logger = logging.getLogger(__name__)


def run_once(app: Celery, stores: Stores, window: Window | None = None) -> dict[str, int]:
    """Counts: `closed` and `lost` workers, `taken_back` jobs. Without a window (by hand) the lease alone counts."""
    settings = stores.settings
    grace_ms = round((settings.lost_after - settings.worker_ttl) * 1000)
    # A worker renews within the renew interval: after a gap each had the chance to be seen before it is given up.
    watched = window is None or window.seconds() >= min(settings.lost_after, settings.renew_interval * 2)
    closed = lost = taken = 0
    for worker in stores.ledger.lapsed_workers():
        found = stores.ledger.lapse(worker, grace_ms, settings.most_losses, most=0)
        closed += found.verdict == "closed"
        if watched and found.verdict == "due" and found.incarnation:
            with stores.engine.connect() as connection:
                life = worker_rows.find_worker(connection, found.incarnation)
            orphans.see_to(life, process_identity.here())
            try:
                given_up = reclaim.take_back(stores.engine, stores.ledger, worker, found.incarnation, grace_ms)
            except DBAPIError as error:
                if not (is_locked(error) or concerns_data(error)):
                    raise
                # It hangs within a commit (`routing.store.fencing`), which the server ends some time, or a row is
                # damaged. The others do not wait.
                logger.warning(
                    "worker %s is lost, but Postgres takes no write of its jobs: they are taken back later: %s",
                    *(worker, told(error)),
                )
                continue
            taken += given_up.taken_back
            lost += given_up.verdict == "gone"
    return {"closed": closed, "lost": lost, "taken_back": taken}
