"""What a worker does at a store beside writing outcomes, and may wait for: in a thread of its own, so that a slow store
delays no outcome."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from celery_capacity.routing import os_threads

logger = logging.getLogger(__name__)


class StoreCalls(os_threads.Thread):
    """Run calls one after the other, in their order. `call` never blocks; what a call raises is logged."""

    def __init__(self) -> None:
        super().__init__(name="store calls", daemon=True)
        self._calls: deque[Callable[[], object]] = deque()
        self._calling = False
        self._changed = threading.Condition()
        self._stopping = False

    def call(self, action: Callable[[], object]) -> None:
        """Run an action in this thread, after those that came before."""
        with self._changed:
            self._calls.append(action)
            self._changed.notify_all()

    def flush(self, within: float) -> bool:
        """Wait until all calls are done; False where that did not come about in `within` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not (self._calls or self._calling), within)

    def stop(self, within: float) -> None:
        """Do what is left, then end; waits for `within` seconds at the most."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self.is_alive():
            self.join(within)

    def run(self) -> None:
        """Do what comes, until it is stopped."""
        while True:
            with self._changed:
                self._calling = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._calls or self._stopping)
                if not self._calls:
                    return
                action = self._calls.popleft()
                self._calling = True
            began = time.monotonic()
            try:
                action()
            except Exception:
                logger.exception("a step beside the outcomes failed (after %.1f s)", time.monotonic() - began)
