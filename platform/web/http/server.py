"""The server: uvicorn on sockets that are bound already, until the process is told to end."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Iterator, Sequence
from ipaddress import ip_address
from typing import Any, Final

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from celery_capacity.platform.web.application import Application
from celery_capacity.routing.errors import InvalidRequest

#: Bytes of the head of a request.
MAX_HEAD: Final = 16 * 1024
#: Seconds for the first request of a connection, and between two of them.
FIRST_REQUEST: Final = 10.0
IDLE: Final = 30
#: Requests and connections at once. More are answered 503.
MAX_CONNECTIONS: Final = 500
#: Seconds for answers under way at the end of the process.
END: Final = 2
#: Connections that wait to be taken.
QUEUE: Final = 128


class Protocol(H11Protocol):
    """HTTP on one connection, which is closed if no request comes, or comes too slowly."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.loop.call_later(FIRST_REQUEST, self._close_unused)

    def _close_unused(self) -> None:
        cycle: Any = self.cycle
        if cycle is None and not self.transport.is_closing():
            self.transport.close()


class Server(uvicorn.Server):
    """uvicorn without its handlers of signals, which would end the process by the signal after an orderly end."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def new_server(app: Application) -> Server:
    options: dict[str, Any] = {
        "http": Protocol,
        "ws": "none",
        "loop": "asyncio",
        "lifespan": "off",
        "access_log": False,
        "log_config": None,
        "log_level": "error",
        "server_header": False,
        "proxy_headers": False,
        "h11_max_incomplete_event_size": MAX_HEAD,
        "limit_concurrency": MAX_CONNECTIONS,
        "timeout_keep_alive": IDLE,
        "timeout_graceful_shutdown": END,
    }
    return Server(uvicorn.Config(app, **options))


async def serve(app: Application, sockets: list[socket.socket]) -> None:
    """Serve until SIGINT or SIGTERM."""
    server = new_server(app)
    loop = asyncio.get_running_loop()

    def end() -> None:
        app.close()
        server.should_exit = True

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, end)
    await server.serve(sockets)


def bind(host: str, port: int) -> list[socket.socket]:
    """Return listening sockets, one for each address of a host. Raises `InvalidRequest` where one cannot listen."""
    bound: list[socket.socket] = []
    try:
        addresses = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, _, _, _, address in dict.fromkeys(addresses):
            listening = socket.socket(family, socket.SOCK_STREAM)
            bound.append(listening)
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            # All addresses of a host share the port that the system chose for the first.
            listening.bind((address[0], bound[0].getsockname()[1] if len(bound) > 1 else port, *address[2:]))
            listening.listen(QUEUE)
            listening.setblocking(False)
    except (OSError, ValueError) as error:  # ValueError: a text that is not a host name
        for listening in bound:
            listening.close()
        raise InvalidRequest(
            f"the dashboard cannot listen on {host}:{port}: {getattr(error, 'strerror', None) or error}",
            value=f"{host}:{port}",
            advice="Choose another with PLATFORM_DASHBOARD, --host or --port.",
        ) from error
    return bound


def is_for_this_machine(sockets: Sequence[socket.socket]) -> bool:
    """Return True if only this machine reaches the sockets."""
    return all(ip_address(bound.getsockname()[0].partition("%")[0]).is_loopback for bound in sockets)
