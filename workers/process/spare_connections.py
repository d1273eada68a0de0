"""Close connections to Redis that nobody needs while a worker is idle. They are made anew when they are needed."""

from __future__ import annotations

from typing import Any

from celery_capacity.routing import os_threads


def close_spare(pool: Any, keep: int = 0) -> None:
    """Close the connections of a pool that nobody uses just now, but for `keep` of them. In any thread."""
    if os_threads.is_green():
        # With greenlets, each thread has connections of its own, and it alone may touch them.
        return
    with pool._lock:
        idle = list(pool._available_connections)
        for connection in idle[: len(idle) - keep]:
            connection.disconnect()
