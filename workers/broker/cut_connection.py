"""Cutting of Celery's connections to a Redis that answers nobody.

A server that is stopped, or behind a network that drops packets, closes no connection. Celery's main loop then waits
for each answer until a time-out, and for another one at each step of its clean-up. The pool is not served for a minute
and more. Here every use of such a connection fails at once, also the use for which the main loop waits just now.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Final, NoReturn

from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry

#: Attributes in which kombu's channel for Redis keeps its pools of connections, once they are made.
_POOLS: Final = ("_pool", "_async_pool")
#: Methods by which a connection of redis-py connects, in all of its versions and behind Sentinels.
_CONNECTS: Final = ("connect", "connect_check_health", "_connect", "_connect_retry")


def is_silence(error: BaseException | None) -> bool:
    """Return True if an error came of a Redis that does not answer in time.

    A Redis that is gone refuses connections instead.
    """
    while error is not None:
        if isinstance(error, (RedisTimeoutError, TimeoutError)):
            return True
        error = error.__cause__
    return False


def cut(connection: Any) -> None:
    """Have every use of a connection of kombu's to Redis fail at once, for good. May run in any thread.

    Connections to other brokers are left as they are.
    """
    transport = getattr(connection, "_transport", None)
    if getattr(transport, "driver_type", None) != "redis":
        return
    # Celery sends its heartbeat events in the main loop, and kombu tries again for ever to connect there.
    connection._establish_connection = _give_up
    for channels in ("channels", "_avail_channels"):
        for channel in list(getattr(transport, channels, None) or ()):
            for name in _POOLS:
                pool = getattr(channel, "__dict__", {}).get(name)
                if pool is not None:
                    _cut_pool(pool)


def _cut_pool(pool: Any) -> None:
    pool.get_connection = _refuse
    for connection in _connections(pool):
        connection.retry = Retry(NoBackoff(), 0)
        for step in _CONNECTS:
            if hasattr(connection, step):
                setattr(connection, step, _refuse)
        sock = getattr(connection, "_sock", None)
        if sock is not None:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


def _connections(pool: Any) -> Iterator[Any]:
    for name in ("_connections", "_available_connections", "_in_use_connections"):
        yield from list(getattr(pool, name, None) or ())


class Cut(Exception):
    """Failure to connect after a cut, upon which kombu does not try again."""


def _give_up(*_: Any, **__: Any) -> NoReturn:
    raise Cut("the connection was cut: Redis does not answer")


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise RedisConnectionError("the connection was cut: Redis does not answer")
