"""What ended jobs left undelivered, see `workers.results.deliver_later`."""

from __future__ import annotations

from celery import Celery

from celery_capacity.workers.process.stores import Stores
from celery_capacity.workers.results.backends import is_asked
from celery_capacity.workers.results.deliver_later import deliver_rows


def run_once(app: Celery, stores: Stores) -> dict[str, int]:
    """Counts: `delivered` jobs."""
    # (Thousands may wait while the backend is away, and each look would read them.)
    return {"delivered": deliver_rows(app, stores) if is_asked(app.backend) else 0}
