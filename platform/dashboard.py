"""HTTP service of the dashboard: the overview as JSON. Read only; a page comes later.

| path | answers |
| --- | --- |
| `/api/v1/dashboard` | the object that `cluster --json` prints |
| `/health` | that this process serves; no store is asked |

The service answers only to its own names in `Host`. Otherwise a foreign page whose name is made to lead here could read
the cluster through the browser that has it open.

A request does not read the stores itself. `Prepared` holds one value, at most `MAX_AGE` old. However many clients ask
at once, one request reads the value, outside the loop. Errors are `application/problem+json`.
"""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable, Iterable
from ipaddress import ip_address
from typing import Any, Final
from urllib.parse import urlsplit

from tornado.web import Application, HTTPError, RequestHandler

from celery_capacity.routing.errors import PlatformError

#: Seconds for which a value that was read answers further requests.
MAX_AGE: Final = 0.2

#: Limits of a client's cost, in bytes and seconds, as options of Tornado's server. No client sends a body here.
LIMITS: Final[dict[str, Any]] = {
    "max_header_size": 16 * 1024,
    "max_body_size": 1024,
    "max_buffer_size": 64 * 1024,
    "idle_connection_timeout": 30.0,
    "body_timeout": 5.0,
}
#: Headers of every answer: no other page frames it, runs it or reads it, and no client keeps it.
HEADERS: Final = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}

Read = Callable[[], dict[str, Any]]


class Prepared:
    """A value shared by all requests. `read` may block; it runs in a thread, never twice at once."""

    def __init__(self, read: Read, clock: Callable[[], float] = time.monotonic) -> None:
        self._read = read
        self._clock = clock
        self._lock = asyncio.Lock()
        self._body = b""
        self._until = float("-inf")

    async def body(self) -> bytes:
        """Return the value as JSON. Raises what `read` raises."""
        async with self._lock:
            if self._clock() >= self._until:
                value = await asyncio.get_running_loop().run_in_executor(None, self._read)
                self._body = json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
                self._until = self._clock() + MAX_AGE
            return self._body


class Handler(RequestHandler):
    """Base of all handlers: common headers, errors and host check. A method that a handler lacks is answered 405."""

    def set_default_headers(self) -> None:
        self.set_header("Content-Type", "application/json")
        for name, value in HEADERS.items():
            self.set_header(name, value)
        self.clear_header("Server")

    def prepare(self) -> None:
        if not is_own(self.request.headers.get("Host", ""), self.settings["names"]):
            raise HTTPError(421, reason="Misdirected Request")

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        error = (kwargs.get("exc_info") or (None, None))[1]
        if isinstance(error, PlatformError):
            problem = error.to_problem()
            self.set_status(error.status)
        else:
            problem = {"type": "about:blank", "title": self._reason, "status": status_code}
        self.set_header("Content-Type", "application/problem+json")
        self.finish(json.dumps(problem))

    def log_exception(self, *exc_info: Any) -> None:
        # Errors that the platform raises on purpose were answered. Only defects belong in the log, with their
        # traceback.
        if not isinstance(exc_info[1], PlatformError):
            super().log_exception(*exc_info)


class Dashboard(Handler):
    def initialize(self, prepared: Prepared) -> None:
        self._prepared = prepared

    async def get(self) -> None:
        self.finish(await self._prepared.body())

    async def head(self) -> None:
        await self.get()


class Health(Handler):
    def get(self) -> None:
        self.finish(json.dumps({"status": "ok"}))

    head = get


class NotFound(Handler):
    def prepare(self) -> None:
        super().prepare()
        raise HTTPError(404)


def is_own(host: str, names: Iterable[str]) -> bool:
    """Return True if a `Host` header names this server, by one of its names or by an address.

    An address is safe, because no foreign name server can forge it.
    """
    try:
        name = urlsplit(f"//{host}").hostname or ""
        ip_address(name)
    except ValueError:
        name = host.rpartition(":")[0] or host
        return name.lower().rstrip(".") in names
    return True


def application(read: Read, name: str = "localhost") -> Application:
    """Return the application with its routes.

    `read` returns the overview's JSON object, or raises PlatformError. `name` is the name under which the server was
    told to listen. The server answers to that name, to the machine's own name, to localhost and to addresses.
    """
    return Application(
        [(r"/api/v1/dashboard", Dashboard, {"prepared": Prepared(read)}), (r"/health", Health)],
        default_handler_class=NotFound,
        names=frozenset({"localhost", name.lower(), socket.gethostname().lower()}),
        # No log: a line for each request does not help a person who watches a terminal.
        log_function=lambda handler: None,
    )
