"""Fail jobs that no registered worker could hold, once this has lasted for PLATFORM_FAIL_INFEASIBLE_AFTER.

A worker that registers and is large enough ends the wait: the clock of the request is dropped, and starts anew when no
such worker is registered any more. Nothing is judged without a worker that serves the job's queue, so a cluster that
was scaled to zero fails no job.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from celery import Celery
from sqlalchemy import Connection

from celery_capacity.routing.database.postgres_errors import is_locked
from celery_capacity.routing.errors import Infeasible, StoreUnavailable
from celery_capacity.routing.model.states import State
from celery_capacity.routing.recovery import infeasible
from celery_capacity.workers.process.stores import Stores
from celery_capacity.workers.results.cancellation import end_before_start, lift_constraints
from celery_capacity.workers.results.deliver_later import deliver_rows

logger = logging.getLogger(__name__)

#: Jobs that one pass ends, at a few round trips each.
MAX_JOBS: Final = 200


def run_once(app: Celery, stores: Stores) -> dict[str, int]:
    """Fail jobs that have waited long enough. Counts: `failed` jobs."""
    if not stores.settings.fail_infeasible_after or stores.ledger.is_unfinished():
        return {}
    filed = infeasible.waiting_in_ledger(stores.redis)

    def find(connection: Connection, shapes: Iterable[str], after: float) -> Mapping[str, str]:
        of_these = {shape: filed[shape] for shape in shapes}
        return infeasible.jobs_in_ledger(connection, stores.redis, of_these, after, MAX_JOBS)

    return _fail(app, stores, filed, find)


def without_ledger(app: Celery, stores: Stores) -> dict[str, int]:
    """Do as `run_once` does, by the rows alone."""
    if not stores.settings.fail_infeasible_after:
        return {}
    with stores.engine.connect() as connection:
        waiting = infeasible.waiting_in_postgres(connection)

    def find(connection: Connection, shapes: Iterable[str], after: float) -> Mapping[str, str]:
        return infeasible.jobs_in_postgres(connection, list(shapes), after, MAX_JOBS)

    return _fail(app, stores, waiting, find)


def _fail(
    app: Celery,
    stores: Stores,
    waiting: Iterable[str],
    find: Callable[[Connection, Iterable[str], float], Mapping[str, str]],
) -> dict[str, int]:
    """Fail jobs of these requests. `find` returns those that have waited for so many seconds, with their requests."""
    after = stores.settings.fail_infeasible_after
    with stores.engine.connect() as connection:
        shortfalls = infeasible.shortfalls(waiting, infeasible.registered_workers(connection, waiting))
        over = infeasible.note(connection, shortfalls, after, stores.settings.lost_after)
        jobs = find(connection, over, after)
    ended = []
    for job, shape in list(jobs.items())[:MAX_JOBS]:
        error = f"{Infeasible.title} for {after:g} s: it {shortfalls[shape]}"
        try:
            if end_before_start(stores, job, State.FAILED, error):
                ended.append(job)
        except StoreUnavailable as problem:
            if not is_locked(problem):
                raise
            logger.warning("job %s fits no registered worker, and its row is locked: it fails later", job)
    if ended:
        deliver_rows(app, stores, ended)
        lift_constraints(app, stores)
    return {"failed": len(ended)}
