"""Safety net for jobs, messages, free room and revokes that were left behind.

Accepted jobs may never have reached the ledger, and messages may never have been claimed. Nobody may have filled free
room, Postgres alone may know of a revoke, and the key of the total may be lost. In a healthy platform the sweep finds
nothing.
"""

from __future__ import annotations

import time

from celery import Celery

from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.recovery import reconcile_indexes, refill, resubmit, revocation, workers_with_room
from celery_capacity.routing.store import backlog
from celery_capacity.workers.duties import apply_transitions
from celery_capacity.workers.process.stores import Stores
from celery_capacity.workers.results.cancellation import carry_out

MAX_ROWS = 1000
#: Seconds for which one sweep brings in jobs. Rows beyond the head of the backlog may be very many, and are marked in
#: time by the duty `refill`.
SECONDS = 5.0


def pause(settings: Settings) -> float:
    """Return the seconds between two sweeps, which is also the age from which a sweep looks after a job.

    Each is half of the sweep interval, so that a job is brought in within that interval.
    """
    return settings.sweep_interval / 2


def run_once(app: Celery, stores: Stores) -> dict[str, int]:
    """Bring in jobs, messages and revokes that were left behind, and fill free room.

    Counts: `submitted` jobs, `redelivered` messages, `admitted` jobs that waited beside free room, `revoked` jobs that
    had only been marked, `fetched` jobs that stayed in Postgres, `drift` where the sum of CPUs was lost.
    """
    return {
        "drift": reconcile_indexes.restore_lost_total(stores.ledger),
        "redelivered": stores.ledger.redeliver(),
        "admitted": workers_with_room.fill_all(stores.ledger),
        "revoked": _revoked(stores),
        "fetched": _fetched(stores),
        # Last, because it needs a Postgres that takes the entries of the stream.
        "submitted": _stranded(app, stores),
    }


def _stranded(app: Celery, stores: Stores) -> int:
    if stores.ledger.is_unfinished():
        # The process that opens the ledger knows which jobs may have started (`routing.policy.unknown_starts`).
        return 0
    submitted, after = 0, 0
    with stores.engine.connect() as connection:
        if not backlog.stranded(connection, pause(stores.settings), 1):
            return 0
    # A started job may still be `accepted` in its row, and its key in the ledger lost. The stream tells the start.
    apply_transitions.run_once(app, stores, older_than_ms=0)
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        with stores.engine.connect() as connection:
            rows = backlog.stranded(connection, pause(stores.settings), MAX_ROWS, after)
        if not rows:
            return submitted
        submitted += resubmit.submit_rows(stores.ledger, rows)
        after = rows[-1].seq
    return submitted


def _fetched(stores: Stores) -> int:
    """Fetch jobs for heads that run low without a note, as after a Redis that forgot its last writes."""
    if stores.ledger.is_unfinished():
        return 0
    stores.ledger.find_low()
    return refill.refill(stores.engine, stores.ledger)["fetched"]


def _revoked(stores: Stores) -> int:
    with stores.engine.connect() as connection:
        return sum(carry_out(stores, job) for jobs in revocation.still_open(connection) for job in jobs)
