"""Guard in front of every request: the host, the rate, the login, and the headers that tell a browser what it may do.

The service answers only to its own names in `Host`. Otherwise a foreign page whose name is made to lead here could read
the cluster through the browser that has it open. The page loads nothing from elsewhere, and no script stands in it.
"""

from __future__ import annotations

import re
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from ipaddress import ip_address
from typing import Any, Final
from urllib.parse import quote, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from celery_capacity.platform.web.http.login import Login, Role, is_same_origin
from celery_capacity.platform.web.http.problems import (
    BodyTooLarge,
    NotAllowed,
    NotLoggedIn,
    TooManyRequests,
    plain_problem,
    problem_response,
)

#: Headers of every answer: no other page frames it, runs it or reads it, and no client keeps it.
HEADERS: Final = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    # With `no-referrer` a browser sends `Origin: null` over plain HTTP, and each form would be refused.
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
#: Policy of a page: its own scripts, styles, pictures and requests, all in files of this server.
PAGE_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self';"
    " base-uri 'none'; frame-ancestors 'none'"
)
#: Other headers of a page: it keeps no handle on a window that opened it.
PAGE_HEADERS: Final = {"Content-Security-Policy": PAGE_POLICY, "Cross-Origin-Opener-Policy": "same-origin"}
#: Headers of the files of a page: a browser asks whether they changed.
FILE_HEADERS: Final = {"Cache-Control": "no-cache"}

#: Requests that a client may send at once, and each second on and on.
BURST: Final = 500
RATE: Final = 50.0
#: Clients that are counted; of more, those that asked longest ago are forgotten.
CLIENTS: Final = 10_000

#: Bytes of the body of an action or of a submission.
MAX_BODY: Final = 8 * 1024 * 1024
#: Methods that change nothing.
READING: Final = ("GET", "HEAD", "OPTIONS")

#: Paths that need no login: they name nothing of the cluster.
OPEN: Final = ("/health", "/healthz", "/readyz", "/login")
FILES: Final = "/static/"
#: Path of the metrics, which only programs ask for: without a login they get an error, and no page.
METRICS: Final = "/metrics"
#: Path of the page about the API. A person who opens it is led to the login.
DOCS: Final = "/api/v1/docs"
_HOST: Final = re.compile(r"[A-Za-z0-9._:\[\]%-]+")


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


class Rates:
    """Budget of each client: `BURST` requests, refilled with `RATE` a second."""

    def __init__(self, burst: float = BURST, rate: float = RATE, clock: Callable[[], float] = time.monotonic) -> None:
        self._burst = burst
        self._rate = rate
        self._clock = clock
        self._clients: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, client: str) -> bool:
        """Return True, and count one request, if the client has any left."""
        now = self._clock()
        left, since = self._clients.pop(client, (self._burst, now))
        left = min(self._burst, left + (now - since) * self._rate)
        allowed = left >= 1
        self._clients[client] = (left - 1 if allowed else left, now)
        if len(self._clients) > CLIENTS:
            self._clients.popitem(last=False)
        return allowed


class Guard:
    """ASGI application in front of another one."""

    def __init__(self, app: ASGIApp, names: frozenset[str], login: Login | None, rates: Rates | None = None) -> None:
        self._app = app
        self._names = names
        self._login = login
        self._rates = rates or Rates()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                _complete(MutableHeaders(scope=message), str(scope["path"]))
            await send(message)

        refused = self._refused(scope)
        if refused is not None:
            await refused(scope, receive, with_headers)
            return
        if scope["method"] == "HEAD":
            # The server leaves the body out.
            scope = {**scope, "method": "GET"}
        await self._app(scope, receive, with_headers)

    def _refused(self, scope: Scope) -> Response | None:
        """Return the answer to a request that goes no further; None for one that does."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if not _HOST.fullmatch(host):
            return problem_response(plain_problem(400))
        if not is_own(host, self._names):
            return problem_response(plain_problem(421))
        client = scope.get("client")
        if not self._rates.take(str(client[0]) if client else ""):
            return problem_response(TooManyRequests().to_problem(), {"Retry-After": "1"})
        path = str(scope["path"])
        if path.startswith("/api/") and scope["method"] not in READING:
            return self._refused_action(self._login, headers)
        if (
            self._login is None
            or self._login.open_reading
            or path in OPEN
            or path.startswith(FILES)
            or self._login.knows(headers)
        ):
            return None
        if (path.startswith("/api/") and path != DOCS) or path == METRICS:
            return problem_response(NotLoggedIn().to_problem(), {"WWW-Authenticate": "Bearer"})
        query = scope["query_string"].decode("latin-1")
        target = path + (f"?{query}" if query else "")
        return RedirectResponse(f"/login?next={quote(target, safe='/')}", 303)

    def _refused_action(self, login: Login | None, headers: Headers) -> Response | None:
        """Return the answer to an action that goes no further. A cookie is not enough, as a browser sends it by itself.

        The length is needed before the body, so that no body is read that is too large.
        """
        if not is_same_origin(headers):
            return problem_response(NotAllowed("the request comes from a page of another site").to_problem())
        # Without a token the action itself refuses.
        role = Role.OPERATOR if login is None else login.shown_role(headers)
        if role is None:
            return problem_response(NotLoggedIn().to_problem(), {"WWW-Authenticate": "Bearer"})
        if role is not Role.OPERATOR:
            return problem_response(NotAllowed("viewers change nothing").to_problem())
        # A chunked body may have a length too, which the server does not go by.
        length = "" if "transfer-encoding" in headers else headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit()):
            return problem_response(plain_problem(411))
        if int(length) > MAX_BODY:
            return problem_response(BodyTooLarge(f"the body has {length} bytes, {MAX_BODY} at most").to_problem())
        return None


def _complete(headers: MutableHeaders, path: str) -> None:
    """Add the headers of every answer, and those of a page or of one of its files."""
    more: dict[str, Any] = dict(HEADERS)
    if headers.get("content-type", "").startswith("text/html"):
        more |= PAGE_HEADERS
    elif path.startswith(FILES):
        more |= FILE_HEADERS
    for name, value in more.items():
        headers[name] = value
