"""Unique keys that keep nobody out any more are forgotten."""

from __future__ import annotations

import secrets
from typing import Final

from celery import Celery

from celery_capacity.routing.store import dependencies
from celery_capacity.workers.process.stores import Stores

#: Seconds for which a key is kept, whatever became of its job.
FORGET_AFTER: Final = 300.0


def run_once(app: Celery, stores: Stores) -> dict[str, int]:
    """Counts: `forgotten` keys. A pass looks at some of them, from a random place on (they are digests) and from the
    first one on: so each comes round, and those that are kept hide no others."""
    with stores.engine.connect() as connection:
        forgotten = dependencies.forget_keys(connection, secrets.token_hex(32), FORGET_AFTER)
        forgotten += dependencies.forget_keys(connection, "", FORGET_AFTER)
    return {"forgotten": forgotten}
