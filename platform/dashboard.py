"""What the dashboard serves over HTTP: the overview as JSON. Read only; a page comes later.

| path | answers |
| --- | --- |
| `/api/v1/dashboard` | the object that `cluster --json` prints |
| `/health` | that this process serves; no store is asked |

A request does not read the stores itself: `Prepared` holds one value, at most `MAX_AGE` old, and however many
ask at once, one of them has it read, outside the loop. Errors are `application/problem+json`.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any, Final

from tornado.web import Application, HTTPError, RequestHandler

from routing.errors import PlatformError

#: Seconds for which a value that was read answers further requests.
MAX_AGE: Final = 0.2

Read = Callable[[], dict[str, Any]]


class Prepared:
    """One value for all requests. `read` may block; it runs in a thread, never twice at once."""

    def __init__(self, read: Read, clock: Callable[[], float] = time.monotonic) -> None:
        self._read = read
        self._clock = clock
        self._lock = asyncio.Lock()
        self._body = b""
        self._until = float("-inf")

    async def body(self) -> bytes:
        """The value as JSON. Raises what `read` raises."""
        async with self._lock:
            if self._clock() >= self._until:
                value = await asyncio.get_running_loop().run_in_executor(None, self._read)
                self._body = json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
                self._until = self._clock() + MAX_AGE
            return self._body


class Handler(RequestHandler):
    """What all answers have in common; whatever a handler does not offer is answered 405."""

    def set_default_headers(self) -> None:
        self.set_header("Content-Type", "application/json")
        self.set_header("Cache-Control", "no-store")
        self.set_header("X-Content-Type-Options", "nosniff")
        self.clear_header("Server")

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
        # What the platform raises on purpose was answered; only defects belong in the log, with their
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
        raise HTTPError(404)


def application(read: Read) -> Application:
    """The routes. `read` returns the overview's JSON object, or raises PlatformError."""
    return Application(
        [(r"/api/v1/dashboard", Dashboard, {"prepared": Prepared(read)}), (r"/health", Health)],
        default_handler_class=NotFound,
        # A line for each request is of no use to the person who watches a terminal.
        log_function=lambda handler: None,
    )
