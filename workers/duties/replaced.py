"""End replaced jobs whose replacement publishes nothing more, see `routing.insert.replacements`.

In a healthy platform the end of the last step has ended these jobs already.
"""

from __future__ import annotations

from celery import Celery

from celery_capacity.routing.insert import replacements
from celery_capacity.workers.process.stores import Stores
from celery_capacity.workers.results.deliver_later import deliver_rows


def run_once(app: Celery, stores: Stores) -> dict[str, int]:
    """End replaced jobs whose replacement publishes nothing more. Counts: `ended` jobs."""
    with stores.engine.connect() as connection:
        ended = replacements.end_abandoned(connection)
    if ended:
        deliver_rows(app, stores, ended)
    return {"ended": len(ended)}
