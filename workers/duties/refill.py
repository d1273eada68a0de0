"""Fetch waiting jobs that stay in Postgres, and see in time that the memory of Redis runs out."""

from __future__ import annotations

import logging
from typing import Final

from celery import Celery

from celery_capacity.routing.recovery import refill
from celery_capacity.workers.process.stores import Stores

logger = logging.getLogger(__name__)

#: Share of `maxmemory` from which on jobs that find no room stay in Postgres, and below which they are filed again.
TIGHT_FROM: Final = 0.90
TIGHT_UNTIL: Final = 0.85


def run_once(app: Celery, stores: Stores) -> dict[str, int]:
    """Fetch jobs for the shapes whose heads run low, and mark the rows of jobs that the ledger left in Postgres.

    Counts: as `routing.recovery.refill.refill`.
    """
    if stores.ledger.is_unfinished():
        # The process that opens the ledger knows which jobs may have started.
        return {}
    watch_memory(stores)
    return refill.refill(stores.engine, stores.ledger)


def watch_memory(stores: Stores) -> None:
    """Tell the ledger whether its memory is short: few jobs of each shape wait in Redis then, the others in Postgres.

    Only a server that refuses writes when it is full is watched. Any other evicts keys, which the preflight reports.
    """
    used, limit, tight = stores.ledger.memory()
    share = used / limit if limit else 0.0
    if not tight and share > TIGHT_FROM:
        stores.ledger.set_tight(True)
        logger.warning("Redis has used %.0f %% of its maxmemory: jobs that find no room stay in Postgres", 100 * share)
    elif tight and share < TIGHT_UNTIL:
        stores.ledger.set_tight(False)
        logger.warning("Redis has used %.0f %% of its maxmemory: jobs wait there again", 100 * share)
