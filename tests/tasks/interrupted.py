"""Beat's scheduler that is told to end while Python drops exceptions: in a `__del__`."""

from __future__ import annotations

import os
import signal

from celery.beat import PersistentScheduler


class Result:
    """A result whose end is interrupted, as that of a submitted task may be."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        # The handler runs between two instructions of Python: here, and not after the return.
        for _ in range(100):
            pass


class InterruptedScheduler(PersistentScheduler):
    def tick(self, *arguments: object, **options: object) -> float:
        interval: float = super().tick(*arguments, **options)
        Result()
        # A scheduler that has sent a task is called again at once.
        return interval and 0.0
