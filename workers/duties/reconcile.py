"""Compare the ledger with Postgres, and make it equal to Postgres."""

from __future__ import annotations

from celery import Celery

from celery_capacity.routing.recovery import reconcile
from celery_capacity.workers.process.stores import Stores


def run_once(app: Celery, stores: Stores) -> dict[str, int]:
    """Make the ledger equal to Postgres. Counts: see `routing.recovery.reconcile.Reconciled`."""
    return reconcile.reconcile(stores.engine, stores.ledger).counts()
