"""A module that steps the wall clock of its worker by as many seconds as the file WALL_CLOCK_STEP holds.

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
    """Return the seconds by which the clock is off."""
    try:
        return float(_FILE.read_text() or 0)
    except FileNotFoundError:
        return 0.0


time.time = lambda: _time() + step()
# The kernel gives its boot time by the present wall clock.
psutil._pslinux.boot_time = lambda: _boot_time() + step()
