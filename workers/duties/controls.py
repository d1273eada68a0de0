"""Copy cordons and pauses to the ledger, where the program of an operator died before it did so."""

from __future__ import annotations

from celery import Celery

from celery_capacity.routing.recovery import controls
from celery_capacity.workers.process.stores import Stores


def run_once(app: Celery, stores: Stores) -> dict[str, int]:
    """Copy the newest actions of operators to the ledger, unless it has them. Counts: `copied` differences."""
    if controls.is_level(stores.engine, stores.ledger):
        return {"copied": 0}
    return {"copied": controls.level(stores.engine, stores.ledger)}
