"""Workers whose leases ran out are closed at once, and lose their jobs when they are LOST."""

from __future__ import annotations

import time

from celery import Celery

from routing import roster
from workers.ledger_thread import MOST_LOSSES
from workers.stores import Stores


class Window:
    """How long the observer has been able to read the ledger without a gap: the silence of the store is not the
    silence of a worker, so LOST counts only time in which a heartbeat could have been seen."""

    def __init__(self) -> None:
        self._since = time.monotonic()

    def restart(self) -> None:
        self._since = time.monotonic()

    def seconds(self) -> float:
        return time.monotonic() - self._since


def run_once(app: Celery, stores: Stores, window: Window | None = None) -> dict[str, int]:
    """Counts: `closed` and `lost` workers, `taken_back` jobs. Without a window (by hand) the lease alone counts."""
    settings = stores.settings
    grace = settings.lost_after - settings.worker_ttl
    # A worker renews within the renew interval: after a gap each had the chance to be seen before it is given up.
    watched = window is None or window.seconds() >= min(settings.lost_after, settings.renew_interval * 2)
    closed = lost = taken = 0
    for worker in stores.ledger.lapsed_workers():
        found = stores.ledger.lapse(worker, round(grace * 1000) if watched else NEVER_MS, MOST_LOSSES)
        taken += found.taken_back
        if found.verdict == "closed":
            closed += 1
        elif found.verdict == "gone":
            lost += 1
            if found.incarnation:
                with stores.engine.connect() as connection:
                    roster.end_worker(connection, found.incarnation, "lost")
    return {"closed": closed, "lost": lost, "taken_back": taken}


#: Milliseconds of grace that no lease ever outlives: close, and take nothing back.
NEVER_MS = 10**12
