"""How long one attempt to reach a server may take in all, however many answers it waits for.

A client's time-outs bound one wait: a server that answers each question just in time would still hold a caller for as
many seconds as it is asked questions (password, database, server, clock, script). Within `attempt`, connections that
`bounded` made begin no wait that could last longer than the attempt.
"""

from __future__ import annotations

import threading
import time
from functools import lru_cache
from typing import Any

import redis

_here = threading.local()


class attempt:  # noqa: N801 - reads as a statement
    """What this thread asks within must be answered in so many seconds, counted from here. Not one inside another."""

    __slots__ = ("_seconds",)

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __enter__(self) -> None:
        _here.until = time.monotonic() + self._seconds

    def __exit__(self, *_: object) -> None:
        _here.until = None


class _Bounded:
    """In front of a connection class of redis-py."""

    socket_timeout: float

    def read_response(self, *args: Any, **options: Any) -> Any:
        until: float | None = getattr(_here, "until", None)
        if until is not None and time.monotonic() + self.socket_timeout > until:
            # The answer that is on its way would be taken for that to the next question.
            self.disconnect()  # type: ignore[attr-defined]
            raise redis.TimeoutError("the server answers too slowly")
        return super().read_response(*args, **options)  # type: ignore[misc]


@lru_cache(maxsize=8)
def _bounded_class(base: type) -> type:
    return type(f"Bounded{base.__name__}", (_Bounded, base), {})


def bounded(client: redis.Redis) -> redis.Redis:
    """The client, with connections that obey `attempt`; it must have a socket time-out, and no connections yet."""
    pool = client.connection_pool
    pool.connection_class = _bounded_class(pool.connection_class)
    # Where Sentinels are asked first, that is part of the attempt.
    for sentinel in getattr(getattr(pool, "sentinel_manager", None), "sentinels", ()):
        bounded(sentinel)
    return client
