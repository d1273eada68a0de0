"""Age of a heartbeat from which people see a worker as silent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from celery_capacity.routing.model.states import Store

if TYPE_CHECKING:
    from celery_capacity.routing.config.settings import Settings

#: A worker is silent after this many times the interval of its renewals without one: 15 s with the default settings.
SILENT_INTERVALS: Final = 1.5
#: Share of the lease after which a row of Postgres, which workers write less often, tells a silent worker.
ROWS_SHARE: Final = 0.75


def silent_after(settings: Settings, source: Store) -> float:
    """Return the age in seconds. `source`: the store that tells the heartbeats."""
    if source == Store.POSTGRES:
        return settings.worker_ttl * ROWS_SHARE
    return settings.renew_interval * SILENT_INTERVALS
