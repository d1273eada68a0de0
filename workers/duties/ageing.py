"""Raise the priority of jobs that have waited for PLATFORM_AGEING seconds once more, see `routing.database.ageing`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final

from celery import Celery

from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.database import ageing
from celery_capacity.routing.store import controls
from celery_capacity.workers.process.stores import Stores, transactions

#: Seconds between two passes where ageing is off. Each runner makes one as it begins, and there is nothing more to do.
OFF: Final = 86400.0
#: Seconds after which a pass ends, though more jobs have come to a step. The next pass goes on there.
SECONDS: Final = 1.0


def pause(settings: Settings) -> float:
    """Return the seconds between two passes: a tenth of a step, within those of other duties, or `OFF`."""
    lowest, highest = settings.due_interval, settings.sweep_interval
    return min(highest, max(lowest, settings.ageing / ageing.MARKS)) if settings.ageing else OFF


def run_once(app: Celery, stores: Stores) -> dict[str, int]:
    """Raise jobs, in the rows and then in the ledger. Counts: `raised` jobs.

    Where the ledger fails in between, a reconcile brings the places of these jobs there.
    """
    return _raise(stores, in_ledger=True)


def without_ledger(app: Celery, stores: Stores) -> dict[str, int]:
    """Do as `run_once` does, by the rows alone."""
    return _raise(stores, in_ledger=False)


def _raise(stores: Stores, in_ledger: bool) -> dict[str, int]:
    seconds = stores.settings.ageing
    if not seconds:
        with transactions(stores.engine).begin() as connection:
            ageing.forget(connection)
        return {}
    end, raised = time.monotonic() + SECONDS, 0
    with transactions(stores.engine).begin() as connection:
        ageing.mark(connection, seconds)
        steps = ageing.begun_steps(connection)
    for begun in steps:
        step: ageing.Step | None = begun
        while step is not None and time.monotonic() < end:
            with transactions(stores.engine).begin() as connection:
                jobs, step = ageing.raise_next(connection, step)
            raised += len(jobs)
            if jobs and in_ledger:
                _move(stores, jobs)
    return {"raised": raised}


def _move(stores: Stores, jobs: Sequence[str]) -> None:
    """Have the ledger move jobs to their new places. One that it does not have yet comes with its row's priority.

    A job is moved again if its priority changed meanwhile: an operator may have moved it between the read and the move.
    """
    moved: dict[str, int] = {}
    while True:
        with stores.engine.connect() as connection:
            ranked = controls.ranked(connection, jobs).values()
        rows = [row for row in ranked if moved.get(row.job) != row.order]
        if not rows:
            return
        stores.ledger.reprioritize([(row.job, row.order, row.behind or "") for row in rows])
        stores.ledger.place_shapes(row.behind for row in rows if row.behind)
        moved |= {row.job: row.order for row in rows}
