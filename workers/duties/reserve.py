"""Make the reservations of blocked jobs anew, so that a wide job gets its turn."""

from __future__ import annotations

import weakref
from typing import Final

from celery import Celery

from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.policy.reservation import Rules
from celery_capacity.routing.recovery.reservations import Memory, renew_reservations
from celery_capacity.workers.process.stores import Stores

#: Memory of the passes of this process, by ledger.
_memories: Final[weakref.WeakKeyDictionary[Ledger, Memory]] = weakref.WeakKeyDictionary()


def run_once(app: Celery, stores: Stores) -> dict[str, int]:
    """Make the reservations anew.

    Counts: as `routing.recovery.reservations.renew_reservations`.
    """
    ledger, settings = stores.ledger, stores.settings
    rules = Rules(settings.backfill_depth, round(settings.reserve_after * 1000))
    return renew_reservations(ledger, rules, _memories.setdefault(ledger, Memory()))
