"""Compare estimated starts with the real ones, and note some new ones, see `routing.forecast.record`."""

from __future__ import annotations

from celery import Celery

from celery_capacity.routing.forecast import record, starts
from celery_capacity.workers.process.stores import Stores, transactions


def run_once(app: Celery, stores: Stores) -> dict[str, int]:
    """Compare the estimates of jobs that have started, and note those of a few that wait. Counts: both."""
    settings = stores.settings
    with transactions(stores.engine).begin() as connection:
        compared = record.compare(connection)
    with stores.engine.execution_options(isolation_level="REPEATABLE READ").begin() as connection:
        noted = starts.sample(connection, starts.rules_of(settings), settings.most_losses, settings.worker_ttl)
    return {"compared": compared, "noted": noted}
