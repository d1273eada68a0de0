"""Transitions that nobody has written to Postgres: those of senders, and of workers that died before their batch."""

from __future__ import annotations

from celery import Celery
from celery.exceptions import WorkerLostError

from routing import enroll, stream
from routing.states import State
from workers.stores import Stores

#: Milliseconds left to a worker to write its own.
OLDER_THAN = 1000


def run_once(app: Celery, stores: Stores) -> dict[str, int]:
    """Counts: `applied` entries, `continued` jobs with a successor that is due, `lost` jobs whose result was stored."""
    entries, applied = stream.apply_all(stores.engine, stores.ledger, older_than_ms=OLDER_THAN)
    continued = enroll.go_on(stores.engine, stores.ledger, applied)
    lost = [one.job for one in applied if one.state == State.LOST]
    for job in lost:
        # No worker is left that would tell whoever waits for the result.
        app.backend.mark_as_failure(job, WorkerLostError("the job was lost with its workers too often"))
    return {"applied": entries, "continued": continued, "lost": len(lost)}
