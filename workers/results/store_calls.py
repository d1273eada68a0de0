"""Calls of a worker to a store beside the writing of outcomes.

They may wait, so they run in a thread of their own: a slow store delays no outcome.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable

from celery_capacity.workers.process.service import QueueService

logger = logging.getLogger(__name__)


class StoreCalls(QueueService):
    """Thread that runs calls one after the other, in their order.

    `call` never blocks. An error of a call is logged.
    """

    def __init__(self) -> None:
        super().__init__("store calls")
        self._calls: deque[Callable[[], object]] = deque()
        self._calling = False

    def call(self, action: Callable[[], object]) -> None:
        """Run an action in this thread, after the actions that came before."""
        with self._changed:
            self._calls.append(action)
            self._changed.notify_all()

    def flush(self, within: float) -> bool:
        """Wait until all calls are done; return False if they are not done in `within` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not (self._calls or self._calling), within)

    def run(self) -> None:
        """Run calls as they come, until this thread is stopped."""
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
