"""Life of a worker that ends at a known time: `PLATFORM_LIFETIME`.

A batch system ends its allocation then, or a provider takes its machine. The worker publishes the end, so that it gets
no job that would not end before. At the end the worker drains, as on a TERM.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import time
from dataclasses import dataclass
from datetime import UTC, datetime

from celery_capacity.routing.errors import SettingsError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Lifetime:
    """End of a worker's life (monotonic): infinity where no end is known."""

    ends_at: float = math.inf

    @classmethod
    def of(cls, setting: float | datetime | None) -> Lifetime:
        """Return the life of a worker that starts now. Raises `SettingsError` where it is over already."""
        if setting is None:
            return cls()
        seconds = (setting - datetime.now(UTC)).total_seconds() if isinstance(setting, datetime) else setting
        if seconds <= 0:
            raise SettingsError(
                [f"PLATFORM_LIFETIME={setting} is over. Give a time to come, or a duration such as 2h from the start."]
            )
        return cls(time.monotonic() + seconds)

    def left_ms(self) -> int | None:
        """Return the milliseconds until the end, never below 0; None where no end is known."""
        return None if self.ends_at == math.inf else max(0, round((self.ends_at - time.monotonic()) * 1000))


def drain_at_end() -> None:
    """Have this worker's process stop, as after a TERM: running jobs go on to their ends.

    Celery's own handler does the work, in the main thread.
    """
    logger.warning("PLATFORM_LIFETIME is over: this worker drains, and stops when its running jobs have ended")
    os.kill(os.getpid(), signal.SIGTERM)
