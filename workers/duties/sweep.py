"""The safety net: accepted jobs that never reached the ledger, messages that never were claimed, room that nobody
filled, and revokes that only Postgres heard of. In a healthy platform it finds nothing."""

from __future__ import annotations

from celery import Celery

from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.recovery import resubmit, revocation, workers_with_room
from celery_capacity.routing.store import backlog
from celery_capacity.workers.duties import apply_transitions
from celery_capacity.workers.process.stores import Stores
from celery_capacity.workers.results.cancellation import carry_out

MOST = 1000


def pause(settings: Settings) -> float:
    """Seconds between two sweeps, and of the age from which a job is looked after: half of the interval each, so that
    it is brought in within the interval."""
    return settings.sweep_interval / 2


def run_once(app: Celery, stores: Stores) -> dict[str, int]:
    """Counts: `submitted` jobs, `redelivered` messages, `admitted` jobs that waited beside free room,
    `revoked` jobs that had been marked alone."""
    return {
        "redelivered": stores.ledger.redeliver(),
        "admitted": _fill(stores),
        "revoked": _revoked(stores),
        # (The last one: it needs a Postgres that takes what is in the stream.)
        "submitted": _stranded(app, stores),
    }


def _stranded(app: Celery, stores: Stores) -> int:
    if stores.ledger.is_unfinished():
        # Whoever opens the ledger knows which of them may have started (`routing.policy.unknown_starts`).
        return 0
    submitted, after = 0, 0
    with stores.engine.connect() as connection:
        if not backlog.stranded(connection, pause(stores.settings), 1):
            return 0
    # A job that has started may be `accepted` in its row still, and its key in the ledger lost. The stream says so.
    apply_transitions.run_once(app, stores, older_than_ms=0)
    while True:
        with stores.engine.connect() as connection:
            rows = backlog.stranded(connection, pause(stores.settings), MOST, after)
        if not rows:
            return submitted
        submitted += resubmit.submit_rows(stores.ledger, rows)
        after = rows[-1].seq


def _fill(stores: Stores) -> int:
    return sum(map(stores.ledger.fill, workers_with_room.with_room(stores.redis)))


def _revoked(stores: Stores) -> int:
    with stores.engine.connect() as connection:
        return sum(carry_out(stores, job) for jobs in revocation.still_open(connection) for job in jobs)
