"""Let the wall clock of the worker that imports this be stepped: by as many seconds as the file WALL_CLOCK_STEP says.

The monotonic clock goes on as it was, as in a machine whose administrator or time service sets the clock.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import psutil

_FILE = Path(os.environ["WALL_CLOCK_STEP"])
_time, _boot_time = time.time, psutil._pslinux.boot_time


def step() -> float:
    """Seconds by which the clock is off."""
    try:
        return float(_FILE.read_text() or 0)
    except FileNotFoundError:
        return 0.0


time.time = lambda: _time() + step()
# The kernel says when it booted by the wall clock of now.
psutil._pslinux.boot_time = lambda: _boot_time() + step()
