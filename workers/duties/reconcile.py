"""The ledger is compared with Postgres, and made equal to it."""

from __future__ import annotations

from celery import Celery

from celery_capacity.routing.recovery import reconcile
from celery_capacity.workers.process.stores import Stores


def run_once(app: Celery, stores: Stores) -> dict[str, int]:
    """Counts: see `routing.recovery.reconcile.Reconciled`."""
    return reconcile.reconcile(stores.engine, stores.ledger).counts()
