"""A module for a worker of a fault test: it asks for heartbeats in pairs, every TICK_EVERY seconds."""

from __future__ import annotations

import os
import threading

from celery_capacity.workers.results import running_workers


def _tick(every: float) -> None:
    pause = threading.Event()
    while not pause.wait(every):
        for worker in running_workers.running():
            # The ticks come as beat's ticks for the heartbeat and for the sweep do, and somebody's challenge.
            worker.on_tick("heartbeat")
            pause.wait(every / 10)
            worker.on_tick("heartbeat")


if os.environ.get("TICK_EVERY"):
    threading.Thread(target=_tick, args=[float(os.environ["TICK_EVERY"])], daemon=True).start()
