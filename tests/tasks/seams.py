"""A module for the workers of a run of faults: a file from outside sets their clock and their heartbeats.

The file that STEP_BY_FILE names has two doubles (`tests.faults.breaking.seams`). The first is the seconds by which
`time.time` is off, in this process and in the processes that it forks. The second is the seconds between two pairs of
heartbeats, 0 for none.
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
import time
from typing import Final

#: Two doubles: the clock's offset, and the time between two pairs of heartbeats.
LAYOUT: Final = struct.Struct("dd")
#: Seconds between two looks at the file while no heartbeats are asked for.
LOOK_EVERY: Final = 0.05

_clock = time.time


def _install(path: str) -> None:
    with open(path, "r+b") as file:
        # The mapping is shared with the process that sets it, and inherited by the processes of a pool.
        shared = mmap.mmap(file.fileno(), LAYOUT.size)

    def stepped() -> float:
        return _clock() + float(LAYOUT.unpack_from(shared)[0])

    def tick() -> None:
        from celery_capacity.workers.results import running_workers

        pause = threading.Event()
        while not pause.wait(LAYOUT.unpack_from(shared)[1] or LOOK_EVERY):
            if every := LAYOUT.unpack_from(shared)[1]:
                for worker in running_workers.running():
                    # The ticks come as beat's ticks for the heartbeat and for the sweep do, one behind the other.
                    worker.on_tick("heartbeat")
                    pause.wait(every / 10)
                    worker.on_tick("heartbeat")

    time.time = stepped
    threading.Thread(target=tick, name="pairs of heartbeats", daemon=True).start()


if os.environ.get("STEP_BY_FILE"):
    _install(os.environ["STEP_BY_FILE"])
