"""Make the reservations of blocked jobs anew, so that a wide job gets its turn."""

from __future__ import annotations

import weakref
from typing import Final

from celery import Celery

from celery_capacity.routing.fallback import reservations
from celery_capacity.routing.forecast.starts import rules_of
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.recovery.reservations import Memory, renew_reservations
from celery_capacity.workers.process.stores import Stores

#: Memory of the passes of this process, by ledger, and of those while Postgres decides.
_memories: Final[weakref.WeakKeyDictionary[Ledger, Memory]] = weakref.WeakKeyDictionary()
_memories_without: Final[weakref.WeakKeyDictionary[Ledger, reservations.Memory]] = weakref.WeakKeyDictionary()


def run_once(app: Celery, stores: Stores) -> dict[str, int]:
    """Make the reservations anew.

    Counts: as `routing.recovery.reservations.renew_reservations`.
    """
    ledger = stores.ledger
    return _tell(ledger, renew_reservations(ledger, rules_of(stores.settings), _memories.setdefault(ledger, Memory())))


def without_ledger(app: Celery, stores: Stores) -> dict[str, int]:
    """Make the reservations anew while Postgres decides. Counts: as `routing.fallback.reservations`."""
    settings = stores.settings
    rules = rules_of(settings)
    if not rules.depth:
        return {}
    memory = _memories_without.setdefault(stores.ledger, reservations.Memory())
    with stores.engine.connect() as connection:
        counts = reservations.renew_reservations(connection, rules, memory, settings.worker_ttl, settings.most_losses)
    return _tell(stores.ledger, counts)


def _tell(ledger: Ledger, counts: dict[str, int]) -> dict[str, int]:
    """Count in the ledger what people ask about afterwards; return the counts of the pass."""
    ledger.tally.add("overran", counts.get("overruns", 0))
    ledger.tally.add("kept", counts.get("kept", 0))
    return counts
