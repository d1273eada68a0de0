"""Calls of a worker to a store beside the writing of outcomes.

They may wait, so they run in a thread of their own: a slow store delays no outcome.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from celery_capacity.workers.results.batch_thread import BatchThread, Left

logger = logging.getLogger(__name__)


class StoreCalls(BatchThread[Callable[[], object]]):
    """Queue of calls that its thread runs one after the other, in their order. An error of a call is logged."""

    most = 1

    def __init__(self) -> None:
        super().__init__("store calls")

    def call(self, action: Callable[[], object]) -> None:
        """Run an action in the thread, after the actions that came before."""
        self.add([action])

    def _work(self, batch: Sequence[Callable[[], object]], *, again: bool) -> Left[Callable[[], object]]:
        for action in batch:
            began = time.monotonic()
            try:
                action()
            except Exception:
                logger.exception("a step beside the outcomes failed (after %.1f s)", time.monotonic() - began)
        return Left()
