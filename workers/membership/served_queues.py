"""Queues of the user's that a worker serves, and the size of its pool: it publishes both beside its machine.

The queues are those that Celery would consume (`-Q`, `-X`, `task_queues`). They change by `control.add_consumer` and
`cancel_consumer`. A reader of the queues looks at `version` to see that they changed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from celery import Celery
from kombu import Queue

from celery_capacity.routing.config.machine import Detected, detect
from celery_capacity.routing.config.settings import Settings
from celery_capacity.workers.broker.queues import check_queue


class ServedQueues:
    """Queues and pool size of a worker. Thread-safe.

    `on_change` is called after each change, in the thread that made it.
    """

    def __init__(self, app: Celery, settings: Settings, on_change: Callable[[], None]) -> None:
        self._settings = settings
        self._on_change = on_change
        self._lock = threading.Lock()
        self._queues: dict[str, Queue] = {}
        for queue in app.amqp.queues.consume_from.values():
            self._queues[check_queue(queue).name] = queue
        self.version = 0
        #: Returns the current size of the pool.
        self.slots: Callable[[], int] = lambda: 1

    @property
    def queues(self) -> list[Queue]:
        """Return the queues, sorted by name."""
        with self._lock:
            return [self._queues[name] for name in sorted(self._queues)]

    def detect(self) -> Detected:
        """Return the capacity as it is now."""
        return detect(self._settings, self.slots(), queues=[queue.name for queue in self.queues])

    def add(self, queue: Queue) -> bool:
        """Serve another queue; return False if it is served already. Raises `InvalidRequest`, `Unsupported`."""
        check_queue(queue)
        with self._lock:
            if queue.name in self._queues:
                return False
            self._queues[queue.name] = queue
            self.version += 1
        self._on_change()
        return True

    def cancel(self, name: str) -> bool:
        """Serve a queue no more; return False if it was not served."""
        with self._lock:
            if self._queues.pop(name, None) is None:
                return False
            self.version += 1
        self._on_change()
        return True
