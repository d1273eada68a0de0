"""Connections to Redis that nobody needs while a worker is idle: closed, and made anew when they are needed."""

from __future__ import annotations

from typing import Any

from celery_capacity.routing import os_threads


def close_spare(pool: Any, keep: int = 0) -> None:
    """Close the connections of a pool that nobody uses just now, but for so many. In any thread."""
    if os_threads.is_green():
        # (Each thread there has its own, and alone may touch them.)
        return
    with pool._lock:
        idle = list(pool._available_connections)
        for connection in idle[: len(idle) - keep]:
            connection.disconnect()
