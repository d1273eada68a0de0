"""Time limit of one attempt to reach a server, for all its answers together.

A client's time-outs bound one wait. A new connection waits for several answers: password, database, server, clock,
script. A server that gives each of them just in time would hold the caller several times as long. Within `attempt`,
connections made by `bounded` begin no wait that could outlast the attempt.
"""

from __future__ import annotations

import threading
import time
from functools import lru_cache
from typing import Any

import redis

#: The end of each thread's attempt.
_of_thread = threading.local()


class attempt:  # noqa: N801 - reads as a statement
    """Block within which this thread gets all its answers, or `redis.TimeoutError`. Blocks cannot be nested.

    `seconds` are counted from the entry.
    """

    __slots__ = ("_seconds",)

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __enter__(self) -> None:
        _of_thread.until = time.monotonic() + self._seconds

    def __exit__(self, *_: object) -> None:
        _of_thread.until = None


class _Bounded:
    """Mixin for a connection class of redis-py."""

    socket_timeout: float

    def read_response(self, *args: Any, **options: Any) -> Any:
        until: float | None = getattr(_of_thread, "until", None)
        if until is not None and time.monotonic() + self.socket_timeout > until:
            # Disconnect: else the next question would take the late answer for its own.
            self.disconnect()  # type: ignore[attr-defined]
            raise redis.TimeoutError("the server answers too slowly")
        return super().read_response(*args, **options)  # type: ignore[misc]


@lru_cache(maxsize=8)
def _bounded_class(base: type) -> type:
    return type(f"Bounded{base.__name__}", (_Bounded, base), {})


def bounded(client: redis.Redis) -> redis.Redis:
    """Make the connections of a client obey `attempt`, and return the client.

    The client must have a socket time-out, and no connections yet.
    """
    pool = client.connection_pool
    pool.connection_class = _bounded_class(pool.connection_class)
    # Questions to Sentinels are part of the attempt.
    for sentinel in getattr(getattr(pool, "sentinel_manager", None), "sentinels", ()):
        bounded(sentinel)
    return client
