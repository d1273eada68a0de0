"""Connections that a fork copies: in the child they are let go of, without a word on them.

A copy of a socket keeps the server's session alive when the parent dies: what a broker then sends to the dead consumer
is lost in it, and locks of a dead session are held. Closing such a connection properly would end the parent's.
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

#: Ports where a URL names none.
USUAL_PORTS: Final = {"amqp": 5672, "amqps": 5671}
POSTGRES_PORT: Final = 5432
#: How the file of a Postgres socket is called.
POSTGRES_SOCKET: Final = ".s.PGSQL."

#: A port, or the path of a socket.
Place = int | str

_guarded: dict[str, tuple[int, Collection[Place]]] = {}


def guard_children(settings: Settings) -> None:
    """From here on, what this process forks (the children of its pool) begins without a connection to any store of the
    platform: its own, and those that Celery holds."""
    if not _guarded:
        os.register_at_fork(after_in_child=_after_fork)
    _guarded["main"] = (os.getpid(), places_of(settings))


def _after_fork() -> None:
    pid, places = _guarded["main"]
    if os.getppid() == pid:
        let_go(sockets_to({*places, *sentinels.ports}))


def places_of(settings: Settings) -> frozenset[Place]:
    """Where the stores and the broker of a platform listen. (Sentinels tell of their Redis when it is connected to.)"""
    found: set[Place] = set()
    for url in (settings.redis_url, settings.broker_url, settings.result_backend, settings.database_url):
        with suppress(ValueError):
            found |= _places(url or "")
    return frozenset(found)


def _places(url: str) -> set[Place]:
    try:
        address = redis_urls.read(url)
    except ValueError:
        parts = urlsplit(url)
        return {parts.port or USUAL_PORTS.get(parts.scheme, POSTGRES_PORT)}
    return {address.path} if address.path else {port for _, port in address.hosts}


def sockets_to(places: Collection[Place]) -> list[int]:
    """The descriptors of this process that are connected to such a place, or to the socket of a Postgres."""
    found = []
    for name in os.listdir("/dev/fd"):
        descriptor = int(name)
        # (The descriptor of the listing itself is gone by now.)
        with suppress(OSError):
            if stat.S_ISSOCK(os.fstat(descriptor).st_mode) and _leads_to(descriptor, places):
                found.append(descriptor)
    return found


def _leads_to(descriptor: int, places: Collection[Place]) -> bool:
    # (Not gevent's, which would have its loop watch it.)
    looked_at = _socket.socket(fileno=descriptor)
    try:
        peer = looked_at.getpeername()
    finally:
        looked_at.detach()
    if isinstance(peer, tuple):
        return peer[1] in places
    path = peer if isinstance(peer, str) else os.fsdecode(peer)
    return POSTGRES_SOCKET in path or path in places


def let_go(descriptors: Iterable[int]) -> None:
    """Have descriptors lead nowhere. They stay taken, so that whoever knows one by its number hits nothing else."""
    nowhere = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for descriptor in descriptors:
        os.dup2(nowhere, descriptor, inheritable=False)
    os.close(nowhere)
