"""Deliver the outboxes that ended jobs left undelivered, see `workers.results.deliver_later`."""

from __future__ import annotations

import time

from celery import Celery

from celery_capacity.workers.process.stores import Stores
from celery_capacity.workers.results.backends import is_asked
from celery_capacity.workers.results.deliver_later import MAX_ROWS, deliver_rows


def run_once(app: Celery, stores: Stores) -> dict[str, int]:
    """Deliver outboxes page by page, for one interval at most.

    After an outage of the backend tens of thousands of outboxes wait, and other duties wait behind them.
    Counts: `delivered` jobs.
    """
    delivered, end = 0, time.monotonic() + stores.settings.due_interval
    # Without this condition, each pass would read the outboxes while the backend is away.
    while is_asked(app.backend):
        page = deliver_rows(app, stores)
        delivered += page
        if page < MAX_ROWS or time.monotonic() >= end:
            break
    return {"delivered": delivered}
