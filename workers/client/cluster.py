"""The cluster as a program sees it: capacity, allocations and the backlog, for programs and as tables in notebooks."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Final

from celery import Celery, current_app

from celery_capacity.routing.errors import PlatformError
from celery_capacity.routing.inspect import overview
from celery_capacity.routing.inspect.worker_lines import WorkerLine
from celery_capacity.routing.ledger.connection import quick_client
from celery_capacity.routing.model.amounts import CPUS, MEMORY, SLOTS, format_cpus, format_memory
from celery_capacity.workers.display import tables
from celery_capacity.workers.process.stores import Stores, platform_of

#: Workers and requests that a notebook shows.
SHOWN: Final = 20
#: Resources that every worker has.
COMMON: Final = (CPUS, MEMORY, SLOTS)


class Cluster:
    """Handle of the cluster. It asks the stores only when a method is called."""

    def __init__(self, stores: Stores) -> None:
        self._stores = stores

    def __repr__(self) -> str:
        return "<Cluster>"

    def info(self) -> dict[str, Any]:
        """Return the object that `cluster --json` prints: totals, workers, what waits, and what is held back.

        Raises `StoreUnavailable` where neither store answers, `NotMigrated`.
        """
        return self._read().to_json()

    def _repr_html_(self) -> str:
        """Return the cluster as tables, for a notebook; an error of a store as a sentence."""
        try:
            seen = self._read()
        except PlatformError as error:
            return tables.sentence("cluster", str(error))
        resources = [*COMMON, *seen.resources]
        totals = [(name, _used(name, seen.allocated(name), seen.total(name))) for name in resources if seen.total(name)]
        facts = [("workers", len(seen.workers)), *totals, ("waiting", seen.waiting), ("decides", seen.source.value)]
        workers = [_row(worker, resources) for worker in seen.workers[:SHOWN]]
        backlog = [(line.waiting, line.request) for line in seen.backlog[:SHOWN]]
        return (
            tables.facts("cluster", facts)
            + tables.listing(_title("workers", len(seen.workers)), ("worker", "status", *resources), workers)
            + tables.listing(_title("waiting", len(seen.backlog)), ("jobs", "request"), backlog)
        )

    @cached_property
    def _client(self) -> Any:
        return quick_client(self._stores.redis)

    def _read(self) -> overview.Overview:
        return overview.read(self._client, self._stores.engine, self._stores.settings.worker_ttl)


def cluster(app: Celery | None = None) -> Cluster:
    """Return a handle of the cluster. `app`: the current one, unless it is given."""
    return Cluster(platform_of(app or current_app._get_current_object()))


def _title(name: str, number: int) -> str:
    return name if number <= SHOWN else f"{name}: {SHOWN} of {number:,}"


def _row(worker: WorkerLine, resources: list[str]) -> tuple[str, ...]:
    return (worker.name, worker.status, *(_of(worker.allocated, worker.capacity, name) for name in resources))


def _of(allocated: Mapping[str, int], capacity: Mapping[str, int], name: str) -> str:
    return _used(name, allocated.get(name, 0), capacity.get(name, 0))


def _used(name: str, allocated: int, total: int) -> str:
    say = {CPUS: format_cpus, MEMORY: format_memory}.get(name, str)
    return f"{say(allocated)} of {say(total)}"
