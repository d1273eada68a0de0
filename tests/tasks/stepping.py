"""A module for a worker of a fault test: SIGUSR2 steps the clock of its main process by STEP_BY seconds."""

from __future__ import annotations

import logging
import os
import signal
import time
from types import FrameType
from typing import Final

SIGNAL: Final = signal.SIGUSR2

_clock = time.time
_offset = 0.0


def _stepped() -> float:
    return _clock() + _offset


def _step(_signum: int, _frame: FrameType | None) -> None:
    global _offset
    _offset = float(os.environ["STEP_BY"])
    logging.getLogger(__name__).warning("the clock was stepped by %s s", os.environ["STEP_BY"])


if os.environ.get("STEP_BY"):
    time.time = _stepped
    signal.signal(SIGNAL, _step)
