"""Metrics of one worker over HTTP, at the address of `PLATFORM_WORKER_METRICS`.

A scrape asks no store: it tells what the worker itself knows. So it answers, and costs nobody anything, while both are
away. A worker whose address is taken goes on without its metrics, and says so.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Final
from weakref import WeakSet

from celery_capacity.routing.model.states import Store
from celery_capacity.workers.supervision import metric_names as names
from celery_capacity.workers.supervision.job_times import JobTimes

logger = logging.getLogger(__name__)

#: Seconds for the last scrape when the worker ends.
END_WITHIN: Final = 2.0
#: Servers of this process. A process of the pool must not keep their ports when the worker has ended.
_listening: Final[WeakSet[Any]] = WeakSet()


@cache
def _close_in_children() -> None:
    """Have each process that forks from this one close the servers, from now on. Safe to call again."""
    os.register_at_fork(after_in_child=_close_all)


def _close_all() -> None:
    for server in list(_listening):
        # Not `server_close`, which would wait for threads that the child does not have.
        server.socket.close()
    _listening.clear()


class WorkerMetrics:
    """Metrics of a worker, from functions that return at once: they are called in the server's threads.

    `times`: wait and run times of its attempts.
    `resources`: returns capacity and allocations by resource, in millicores, bytes and counts. `reached_at`: returns
    the time of the newest heartbeat that reached the store that decides (monotonic), 0 before the first. `authority`:
    returns who decides as far as the worker knows, and the epoch.
    """

    def __init__(
        self,
        worker: str,
        resources: Callable[[], tuple[Mapping[str, int], Mapping[str, int]]],
        reached_at: Callable[[], float],
        authority: Callable[[], tuple[Store | None, int]],
        times: JobTimes,
    ) -> None:
        self._worker = worker
        self._resources = resources
        self._reached_at = reached_at
        self._authority = authority
        self._times = times
        self._serving: tuple[Any, threading.Thread] | None = None
        self._pid = 0

    def collect(self) -> list[Any]:
        """Return the families, as a collector of prometheus_client does."""
        from celery_capacity.workers.supervision import exposition

        capacity, allocated, ages = map(exposition.family, (names.CAPACITY, names.ALLOCATED, names.HEARTBEAT_AGE))
        exposition.add_resources(capacity, allocated, self._worker, *self._resources())
        if reached_at := self._reached_at():
            ages.add_metric([self._worker], time.monotonic() - reached_at)
        resources = (capacity, allocated, ages)
        return [
            *resources,
            *exposition.authority_families(*self._authority()),
            *self._times.families(self._worker),
        ]

    def start(self, address: tuple[str, int]) -> int | None:
        """Serve at (host, port); return the port. Port 0: one that is free. None, with a warning, where it is taken."""
        # Imported here: a worker without the setting needs no server.
        from prometheus_client import CollectorRegistry, start_http_server

        host, port = address
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        try:
            server, thread = start_http_server(port, host, registry)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            logger.warning(
                "no metrics of this worker: PLATFORM_WORKER_METRICS=%s:%d cannot be listened on (%s);"
                " give each worker of a machine a port of its own",
                *(host, port, reason),
            )
            return None
        _close_in_children()
        _listening.add(server)
        self._serving, self._pid = (server, thread), os.getpid()
        used = int(server.server_address[1])
        logger.info("metrics of this worker: http://%s:%d/metrics", f"[{host}]" if ":" in host else host, used)
        return used

    def stop(self) -> None:
        """Serve no more, and free the port. Safe to call twice."""
        if self._serving is None or self._pid != os.getpid():
            return
        (server, thread), self._serving = self._serving, None
        server.shutdown()
        server.server_close()
        _listening.discard(server)
        thread.join(END_WITHIN)
