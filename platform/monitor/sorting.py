"""Orders in which people look at workers: the fullest, the busiest or the most silent first, or by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final

from celery_capacity.routing.model.amounts import CPUS, MEMORY, SLOTS

if TYPE_CHECKING:
    from celery_capacity.routing.inspect.worker_lines import WorkerLine


def _share(worker: WorkerLine, resource: str) -> float:
    """Return the allocated share of a resource. A worker without any is the emptiest."""
    total = worker.capacity.get(resource, 0)
    return worker.allocated.get(resource, 0) / total if total else 0.0


#: Key of each order; greater values come first.
ORDERS: Final[dict[str, Callable[[WorkerLine], float]]] = {
    "name": lambda _worker: 0.0,
    "cpus": lambda worker: _share(worker, CPUS),
    "memory": lambda worker: _share(worker, MEMORY),
    "jobs": lambda worker: worker.allocated.get(SLOTS, 0),
    "heartbeat": lambda worker: worker.heartbeat_age or 0.0,
}


def ordered(workers: Iterable[WorkerLine], order: str) -> list[WorkerLine]:
    """Return the workers in this order, equal ones by name."""
    key: Any = ORDERS[order]
    return sorted(sorted(workers, key=lambda worker: worker.name), key=key, reverse=True)
