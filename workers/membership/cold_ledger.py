"""Reopening of a cold ledger."""

from __future__ import annotations

import logging

from celery_capacity.routing.database import deadlines
from celery_capacity.routing.recovery import rebuild
from celery_capacity.workers.process.stores import Stores

logger = logging.getLogger(__name__)


def open_ledger(stores: Stores) -> dict[str, int]:
    """Open a new epoch if the ledger is cold and no other process is doing so; return counts of the work done."""
    with deadlines.patiently(stores.settings.store_timeout * deadlines.LONG):
        done = rebuild.open_if_cold(stores.engine, stores.ledger)
    if done is None:
        return {}
    if done.workers == done.held == done.filed == 0:
        logger.info("scheduler state initialised (epoch %d)", done.epoch)
    else:
        logger.warning(
            "scheduler state was lost and is rebuilt: epoch %d is open, with %d workers, %d held and %d waiting jobs",
            done.epoch,
            done.workers,
            done.held,
            done.filed,
        )
    return {"epochs": 1, "books": done.workers, "held": done.held, "filed": done.filed}
