"""Transitions that nobody has written to Postgres: those of senders, and of workers that died before their batch."""

from __future__ import annotations

from celery import Celery

from routing import enroll, stream
from workers.stores import Stores

#: Milliseconds left to a worker to write its own.
OLDER_THAN = 1000


def run_once(app: Celery, stores: Stores) -> dict[str, int]:
    """Counts: `applied` entries, `continued` jobs with a successor that is due."""
    entries, applied = stream.apply_all(stores.engine, stores.ledger, older_than_ms=OLDER_THAN)
    return {"applied": entries, "continued": enroll.go_on(stores.engine, stores.ledger, applied)}
