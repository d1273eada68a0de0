"""Learn how long the jobs of each task run, see `routing.store.run_times`."""

from __future__ import annotations

from celery import Celery

from celery_capacity.routing.store import run_times
from celery_capacity.workers.process.stores import Stores, transactions


def run_once(app: Celery, stores: Stores) -> dict[str, int]:
    """Learn from the jobs that succeeded since the last pass. Counts: `learned` jobs."""
    if not stores.settings.learn_run_times:
        return {"learned": 0}
    with transactions(stores.engine).begin() as connection:
        return {"learned": run_times.learn(connection)}
