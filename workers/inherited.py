"""Connections that a fork copies: in the child they are let go of, without a word on them.

A copy of a socket keeps the server's session alive when the parent dies: what a broker then sends to the dead consumer
is lost in it, and locks of a dead session are held. Closing such a connection properly would end the parent's.
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Collection, Iterable
from contextlib import suppress
from typing import Final
from urllib.parse import urlsplit

from routing.settings import Settings

#: Ports where a URL names none.
USUAL_PORTS: Final = {"redis": 6379, "rediss": 6379, "amqp": 5672, "amqps": 5671}
POSTGRES_PORT: Final = 5432
#: How the file of a Postgres socket is called.
POSTGRES_SOCKET: Final = ".s.PGSQL."

_guarded: dict[str, tuple[int, Collection[int]]] = {}


def guard_children(settings: Settings) -> None:
    """From here on, what this process forks (the children of its pool) begins without a connection to any store of the
    platform: its own, and those that Celery holds."""
    if not _guarded:
        os.register_at_fork(after_in_child=_after_fork)
    _guarded["main"] = (os.getpid(), ports_of(settings))


def _after_fork() -> None:
    pid, ports = _guarded["main"]
    if os.getppid() == pid:
        let_go(sockets_to(ports))


def ports_of(settings: Settings) -> frozenset[int]:
    """The ports at which the stores and the broker of a platform listen."""
    found = set()
    for url in (settings.redis_url, settings.broker_url, settings.result_backend, settings.database_url):
        parts = urlsplit(url or "")
        with suppress(ValueError):
            found.add(parts.port or USUAL_PORTS.get(parts.scheme, POSTGRES_PORT))
    return frozenset(found)


def sockets_to(ports: Collection[int]) -> list[int]:
    """The descriptors of this process that are connected to such a port, or to the socket of a Postgres."""
    found = []
    for name in os.listdir("/dev/fd"):
        descriptor = int(name)
        # (The descriptor of the listing itself is gone by now.)
        with suppress(OSError):
            if stat.S_ISSOCK(os.fstat(descriptor).st_mode) and _leads_to(descriptor, ports):
                found.append(descriptor)
    return found


def _leads_to(descriptor: int, ports: Collection[int]) -> bool:
    looked_at = socket.socket(fileno=descriptor)
    try:
        peer = looked_at.getpeername()
    finally:
        looked_at.detach()
    if isinstance(peer, tuple):
        return peer[1] in ports
    return POSTGRES_SOCKET in (peer if isinstance(peer, str) else os.fsdecode(peer))


def let_go(descriptors: Iterable[int]) -> None:
    """Have descriptors lead nowhere. They stay taken, so that whoever knows one by its number hits nothing else."""
    nowhere = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for descriptor in descriptors:
        os.dup2(nowhere, descriptor, inheritable=False)
    os.close(nowhere)
