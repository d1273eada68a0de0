"""Compare estimated starts with the real ones, and note some new ones, see `routing.forecast.record`."""

from __future__ import annotations

from celery import Celery

from celery_capacity.routing.database.authority import read_authority
from celery_capacity.routing.forecast import record, starts
from celery_capacity.routing.forecast.shares import read_shares
from celery_capacity.routing.model.states import Store
from celery_capacity.workers.process.stores import Stores, transactions


def run_once(app: Celery, stores: Stores) -> dict[str, int]:
    """Compare the estimates of jobs that have started, and note those of a few that wait. Counts: both."""
    settings = stores.settings
    with transactions(stores.engine).begin() as connection:
        compared = record.compare(connection)
    with stores.engine.execution_options(isolation_level="REPEATABLE READ").begin() as connection:
        pulled = read_authority(connection).authority == Store.POSTGRES
        shares = read_shares(connection, None if pulled else stores.redis, settings.share_halves_in)
        rules = starts.rules_of(settings)
        noted = starts.sample(connection, rules, settings.most_losses, settings.worker_ttl, shares)
    return {"compared": compared, "noted": noted}
