"""Forget actions of operators that the audit has kept for long enough."""

from __future__ import annotations

from typing import Final

from celery import Celery

from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.database import audit
from celery_capacity.workers.process.stores import Stores

#: Seconds between two passes, where actions are kept for days.
PASS: Final = 3600.0


def pause(settings: Settings) -> float:
    """Return the seconds between two passes: a tenth of the time for which an action is kept, an hour at most."""
    return min(PASS, settings.keep_audit / 10) or PASS


def run_once(app: Celery, stores: Stores) -> dict[str, int]:
    """Delete actions that are older than the setting `keep_audit`. Counts: `forgotten` actions."""
    keep = stores.settings.keep_audit
    if not keep:
        return {"forgotten": 0}
    with stores.engine.connect() as connection:
        return {"forgotten": audit.forget(connection, keep)}
