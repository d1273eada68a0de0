"""Services of a worker: each works in a thread of its own, from its start until it is stopped.

A service that only sometimes has something to do starts its thread on demand.
"""

from __future__ import annotations

import logging
import os
import threading
from abc import ABC, abstractmethod

from celery_capacity.routing import os_threads
from celery_capacity.routing.wake import Wake

logger = logging.getLogger(__name__)


class Service(ABC):
    """Part of a worker with a name, `start` and `stop`.

    Its `run` ends soon after `_stopping` is set and `_notify` was called.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._stopping = False
        self._thread: os_threads.Thread | None = None

    @abstractmethod
    def run(self) -> None:
        """Work until `_stopping` is set; in the service's thread."""

    @abstractmethod
    def _notify(self) -> None:
        """Have `run` look around, whatever it waits for."""

    def start(self) -> None:
        self._thread = os_threads.Thread(target=self.run, name=self.name, daemon=True)
        self._thread.start()

    def stop(self, within: float) -> bool:
        """Have the thread end once its present step is done; return False if it lives after `within` seconds."""
        self._stopping = True
        self._notify()
        thread = self._thread
        if thread is not None and thread.is_alive():
            thread.join(within)
        return not self.is_alive()

    def is_alive(self) -> bool:
        """Return True if the service has a thread now."""
        thread = self._thread
        return thread is not None and thread.is_alive()


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


class OnDemandService(Service):
    """Service with a thread only while it has something to do.

    A caller that makes something to do calls `_ensure` afterwards. The thread ends by `_ends`, which looks once more.
    Both hold `_changed`, so the thread of a service that has something to do never ends unseen. Not for signal
    handlers. A child process has none of its parent's threads, and starts none.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._changed = threading.Condition()
        #: Process in which the service was started; 0 before that.
        self._pid = 0

    @abstractmethod
    def _has_work(self) -> bool:
        """Return True if the service needs its thread. The caller holds `_changed`."""

    def start(self) -> None:
        self._pid = os.getpid()
        self._ensure()

    def stop(self, within: float) -> bool:
        # A system that had no thread for this work may have one now.
        if not self._ensure():
            # An interpreter that ends starts no thread: the caller works.
            self._stopping = True
            self.run()
        return super().stop(within)

    def wake(self) -> None:
        """Start the thread where there is something to do; in any thread."""
        self._ensure()

    def _ensure(self) -> bool:
        """Start the thread where there is something to do; return False if the system has no thread for it."""
        with self._changed:
            if self._thread is not None or self._stopping or not self._has_work() or self._pid != os.getpid():
                return True
            self._thread = os_threads.Thread(target=self._live, name=self.name, daemon=True)
            try:
                self._thread.start()
            except RuntimeError as error:
                self._thread = None
                logger.error("%s: no thread can be started, the next call tries again: %s", self.name, error)
                return False
            return True

    def _live(self) -> None:
        try:
            self.run()
        except BaseException:
            # The next call starts another thread.
            with self._changed:
                self._thread = None
            raise

    def _ends(self) -> bool:
        """Return True if the thread is to end, since there is nothing to do; the next demand starts another thread."""
        with self._changed:
            if self._has_work() and not self._stopping:
                return False
            if not self._stopping:
                self._thread = None
            return True


class OnDemandLookingService(OnDemandService, LookingService):
    """Service that looks at something again and again while it is wanted, and else has no thread."""

    def wake(self) -> None:
        """Have the thread look soon, and start it where it is wanted; in any thread."""
        super().wake()
        self._wake.set()


class Services:
    """Services of a worker in the order in which they start. They stop in the opposite order."""

    def __init__(self, *services: Service | None) -> None:
        """Take the services that the worker has; None stands for one that it does not need."""
        self._services = [service for service in services if service is not None]

    def start(self) -> None:
        for service in self._services:
            service.start()

    def stop(self, within: float) -> None:
        """Stop the services, and wait for each of them `within` seconds at the most."""
        for service in reversed(self._services):
            service.stop(within)
