"""Learn how long the jobs of each task run, see `routing.store.run_times`."""

from __future__ import annotations

import time
from typing import Final

from celery import Celery

from celery_capacity.routing.store import run_times
from celery_capacity.workers.process.stores import Stores, transactions

#: Seconds after which a pass ends, though more jobs have ended. It reads far more than end meanwhile.
SECONDS: Final = 1.0


def run_once(app: Celery, stores: Stores) -> dict[str, int]:
    """Learn from the jobs that succeeded since the last pass. Counts: `learned` jobs."""
    learned, more, end = 0, stores.settings.learn_run_times, time.monotonic() + SECONDS
    while more:
        with transactions(stores.engine).begin() as connection:
            jobs, more = run_times.learn(connection)
        learned += jobs
        more = more and time.monotonic() < end
    return {"learned": learned}
