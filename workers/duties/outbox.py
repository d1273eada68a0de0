"""What ended jobs left undelivered, see `workers.undelivered`."""

from __future__ import annotations

from celery import Celery

from workers.stores import Stores
from workers.undelivered import deliver_rows


def run_once(app: Celery, stores: Stores) -> dict[str, int]:
    """Counts: `delivered` jobs."""
    return {"delivered": deliver_rows(app, stores)}
