"""What ended jobs left undelivered, see `workers.undelivered`."""

from __future__ import annotations

from celery import Celery

from celery_capacity.workers.results import is_asked
from celery_capacity.workers.stores import Stores
from celery_capacity.workers.undelivered import deliver_rows


def run_once(app: Celery, stores: Stores) -> dict[str, int]:
    """Counts: `delivered` jobs."""
    # (Thousands may wait while the backend is away, and each look would read them.)
    return {"delivered": deliver_rows(app, stores) if is_asked(app.backend) else 0}
