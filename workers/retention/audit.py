"""Forget actions of operators that the audit has kept for long enough."""

from __future__ import annotations

import time
from typing import Final

from celery import Celery

from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.database import audit
from celery_capacity.workers.process.stores import Stores

#: Seconds between two passes, where actions are kept for days.
PASS: Final = 3600.0
#: Least seconds between two passes, and the greatest share of them that a pass takes.
SHORTEST_PASS: Final = 1.0
MAX_SHARE: Final = 0.1


def pause(settings: Settings) -> float:
    """Return the seconds between two passes: a tenth of the time for which an action is kept, within limits."""
    return min(PASS, max(SHORTEST_PASS, settings.keep_audit / 10)) if settings.keep_audit else PASS


def run_once(app: Celery, stores: Stores) -> dict[str, int]:
    """Delete actions that are older than the setting `keep_audit`. Counts: `forgotten` actions."""
    keep = stores.settings.keep_audit
    if not keep:
        return {"forgotten": 0}
    forgotten, until = 0, time.monotonic() + MAX_SHARE * pause(stores.settings)
    while True:
        with stores.engine.connect() as connection:
            chunk = audit.forget(connection, keep)
        forgotten += chunk
        if chunk < audit.CHUNK or time.monotonic() >= until:
            return {"forgotten": forgotten}
