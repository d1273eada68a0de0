"""Connections that a fork copies: the child lets go of them, and sends nothing over them.

A copied socket keeps the server's session alive when the parent dies. Then the messages that a broker sends to the dead
consumer are lost in it, and the locks of the dead session stay held. To close such a connection properly would end the
parent's connection.
"""

from __future__ import annotations

import _socket
import os
import stat
from collections.abc import Collection, Iterable
from contextlib import suppress
from typing import Final
from urllib.parse import urlsplit

from celery_capacity.routing.config import redis_urls
from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.ledger import sentinels

#: Ports by scheme, for a URL that names none.
USUAL_PORTS: Final = {"amqp": 5672, "amqps": 5671}
POSTGRES_PORT: Final = 5432
#: Beginning of the file name of a Postgres socket.
POSTGRES_SOCKET: Final = ".s.PGSQL."

#: A port, or the path of a socket.
Endpoint = int | str

_guarded: dict[str, tuple[int, Collection[Endpoint]]] = {}


def guard_children(settings: Settings) -> None:
    """Let the children of this process's pool begin without a connection to any store of the platform.

    From here on a forked child has neither the platform's own connections nor those that Celery holds.
    """
    if not _guarded:
        os.register_at_fork(after_in_child=_after_fork)
    _guarded["main"] = (os.getpid(), endpoints_of(settings))


def _after_fork() -> None:
    pid, endpoints = _guarded["main"]
    if os.getppid() == pid:
        let_go(sockets_to({*endpoints, *sentinels.ports}))


def endpoints_of(settings: Settings) -> frozenset[Endpoint]:
    """Return the endpoints at which the stores and the broker of a platform listen.

    Behind sentinels, the endpoint of Redis is learnt when it is connected to.
    """
    endpoints: set[Endpoint] = set()
    for url in (settings.redis_url, settings.broker_url, settings.result_backend, settings.database_url):
        with suppress(ValueError):
            endpoints |= _endpoints(url or "")
    return frozenset(endpoints)


def _endpoints(url: str) -> set[Endpoint]:
    try:
        address = redis_urls.read(url)
    except ValueError:
        split = urlsplit(url)
        return {split.port or USUAL_PORTS.get(split.scheme, POSTGRES_PORT)}
    return {address.path} if address.path else {port for _, port in address.hosts}


def sockets_to(endpoints: Collection[Endpoint]) -> list[int]:
    """Return the descriptors of this process that are connected to such an endpoint, or to the socket of a Postgres."""
    descriptors = []
    for name in os.listdir("/dev/fd"):
        descriptor = int(name)
        # The descriptor of the listing itself is gone by now.
        with suppress(OSError):
            if stat.S_ISSOCK(os.fstat(descriptor).st_mode) and _leads_to(descriptor, endpoints):
                descriptors.append(descriptor)
    return descriptors


def _leads_to(descriptor: int, endpoints: Collection[Endpoint]) -> bool:
    # The plain socket class: gevent's loop would watch a socket of gevent.
    looked_at = _socket.socket(fileno=descriptor)
    try:
        peer = looked_at.getpeername()
    finally:
        looked_at.detach()
    if isinstance(peer, tuple):
        return peer[1] in endpoints
    path = peer if isinstance(peer, str) else os.fsdecode(peer)
    return POSTGRES_SOCKET in path or path in endpoints


def let_go(descriptors: Iterable[int]) -> None:
    """Point descriptors at /dev/null instead of closing them, so that their numbers are not reused.

    Code that still knows a descriptor by its number then hits nothing else.
    """
    nowhere = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for descriptor in descriptors:
        os.dup2(nowhere, descriptor, inheritable=False)
    os.close(nowhere)
