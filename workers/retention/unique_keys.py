"""Forget keys that hold no job back any more: unique ones, and the pace of those with a rate."""

from __future__ import annotations

import secrets
from typing import Final

from celery import Celery

from celery_capacity.routing.insert import key_limits
from celery_capacity.routing.store import dependencies
from celery_capacity.workers.process.stores import Stores

#: Seconds for which a key is kept in any case, even if its job has ended.
FORGET_AFTER: Final = 300.0


def run_once(app: Celery, stores: Stores) -> dict[str, int]:
    """Forget unique keys that keep no job out any more, and the pace of keys without jobs. Counts: `forgotten` keys.

    A pass looks at some of the keys: from a random digest on, and from the first key on. Keys are digests. So each key
    comes round, and kept keys hide no others.
    """
    with stores.engine.connect() as connection:
        forgotten = dependencies.forget_keys(connection, secrets.token_hex(32), FORGET_AFTER)
        forgotten += dependencies.forget_keys(connection, "", FORGET_AFTER)
        forgotten += key_limits.forget_rates(connection, FORGET_AFTER)
    return {"forgotten": forgotten}
