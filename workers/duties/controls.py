"""Copy the orders of operators to the ledger, where their program died before it did so, and keep shares up to date."""

from __future__ import annotations

from celery import Celery

from celery_capacity.routing.recovery import controls
from celery_capacity.workers.process.stores import Stores


def run_once(app: Celery, stores: Stores) -> dict[str, int]:
    """Copy the newest actions of operators to the ledger, unless it has them. Counts: `copied` differences."""
    controls.refresh_shares(stores.engine, stores.ledger)
    if controls.is_level(stores.engine, stores.ledger):
        return {"copied": 0}
    return {"copied": controls.level(stores.engine, stores.ledger)}
