"""Login by the token of the dashboard: as a header for programs, and once for a browser, which then keeps a cookie.

The cookie holds no token. It holds its own end and a signature of it with the token, so a new token ends all sessions.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable
from http.cookies import CookieError, SimpleCookie
from typing import Final

from starlette.datastructures import Headers

COOKIE: Final = "capacity_session"
#: Seconds after which a person logs in again: a working day.
SESSION: Final = 12 * 3600
#: bytes of the body of a login
MAX_BODY: Final = 4096


class Login:
    """The token of this server, and the sessions that were opened by it."""

    def __init__(self, token: str, clock: Callable[[], float] = time.time) -> None:
        self._token = token.encode()
        self._clock = clock

    def is_token(self, text: str) -> bool:
        """Compare a text with the token, in a time that tells nothing of it."""
        return hmac.compare_digest(text.encode("utf-8", "backslashreplace"), self._token)

    def new_session(self) -> str:
        """Return the value of a cookie that is good for `SESSION` seconds."""
        end = str(int(self._clock()) + SESSION)
        return f"{end}.{self._signature(end)}"

    def knows(self, headers: Headers) -> bool:
        """Return True if a request shows the token, or the cookie of a session that has not ended."""
        kind, _, token = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer":
            return self.is_token(token.strip())
        try:
            morsel = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        except CookieError:
            return False
        end, _, signature = ("" if morsel is None else morsel.value).partition(".")
        signed = hmac.compare_digest(signature.encode("utf-8", "replace"), self._signature(end).encode())
        return signed and end.isascii() and end.isdigit() and int(end) > self._clock()

    def _signature(self, end: str) -> str:
        return hmac.new(self._token, f"session {end}".encode("utf-8", "replace"), hashlib.sha256).hexdigest()


def is_same_origin(headers: Headers) -> bool:
    """Return True if a form comes from a page of this server, as far as its browser tells."""
    site = headers.get("sec-fetch-site")
    if site is not None:
        return site in ("same-origin", "none")
    origin = headers.get("origin")
    return origin is None or origin.rpartition("//")[2] == headers.get("host")


def path_of_this_server(target: str) -> str:
    """Return a path to go on to after the login, or `/` for anything that leads elsewhere."""
    leads_away = not target.startswith("/") or target.startswith(("//", "/\\")) or any(c < " " for c in target)
    return "/" if leads_away else target
