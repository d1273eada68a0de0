"""Services of a worker: threads that are started, and work until they are stopped."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod

from celery_capacity.routing import os_threads
from celery_capacity.routing.wake import Wake


class Service(os_threads.Thread, ABC):
    """Thread with a name, `start` and `stop`. Its `run` ends soon after `_stopping` is set and `_notify` was called."""

    def __init__(self, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self._stopping = False

    @abstractmethod
    def _notify(self) -> None:
        """Have `run` look around, whatever it waits for."""

    def stop(self, within: float) -> None:
        """Have the thread end once its present step is done, and wait `within` seconds at the most."""
        self._stopping = True
        self._notify()
        if self.is_alive():
            self.join(within)


class LookingService(Service):
    """Service that looks at something again and again, and sleeps in between."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._wake = Wake()

    def _notify(self) -> None:
        self._wake.set()

    def wake(self) -> None:
        """Have the thread look soon, in any thread or signal handler."""
        self._wake.set()


class QueueService(Service):
    """Service that works through what others give it. All its state is changed with `_changed` held."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._changed = threading.Condition()

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()
