"""Login by a token of the dashboard: as a header for programs, and once for a browser, which then keeps a cookie.

The token tells the role: operators read and act, viewers read. The cookie holds no token. It holds its role, its end
and a signature of them with the token, so a new token ends all sessions.

A cookie reads. An action needs what no foreign page can send: a program sends the token in a header, and a form of a
page sends the form token of its session, a signature that only pages of this server show.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from http.cookies import CookieError, SimpleCookie
from typing import Final

from starlette.datastructures import Headers

COOKIE: Final = "capacity_session"
#: Seconds after which a person logs in again: a working day.
SESSION: Final = 12 * 3600
#: bytes of the body of a login
MAX_BODY: Final = 4096


class Role(StrEnum):
    """Rights of a client."""

    #: reads
    VIEWER = "viewer"
    #: reads and acts
    OPERATOR = "operator"


@dataclass(frozen=True, slots=True)
class Session:
    """Login of a browser. `form_token`: the token that a form needs to act in this session."""

    role: Role
    form_token: str


@dataclass(frozen=True, slots=True)
class Access:
    """Access beside the token of operators.

    `viewer`: the token of viewers. `open_reading`: reading needs no token. `user_header`: the header in which a proxy
    names who acts.
    """

    viewer: str | None = None
    open_reading: bool = False
    user_header: str | None = None


class Login:
    """The tokens of this server, and the sessions that were opened by them.

    `token`: of operators.
    """

    def __init__(self, token: str, clock: Callable[[], float] = time.time, access: Access = Access()) -> None:
        self._tokens = {Role.OPERATOR: token.encode()}
        if access.viewer is not None:
            self._tokens[Role.VIEWER] = access.viewer.encode()
        self._clock = clock
        self.open_reading = access.open_reading

    def role_of_token(self, text: str) -> Role | None:
        """Return the role of a token; None for a wrong one. The time of the comparison tells nothing of the tokens."""
        typed = text.encode("utf-8", "backslashreplace")
        matching = [role for role, token in self._tokens.items() if hmac.compare_digest(typed, token)]
        return matching[0] if matching else None

    def new_session(self, role: Role) -> str:
        """Return the value of a cookie that is good for `SESSION` seconds."""
        end = str(int(self._clock()) + SESSION)
        return f"{role}.{end}.{self._signature(role, f'session {role} {end}')}"

    def shown_role(self, headers: Headers) -> Role | None:
        """Return the role of the token in the header of a request; None where it shows none, or a wrong one."""
        kind, _, token = headers.get("authorization", "").partition(" ")
        return self.role_of_token(token.strip()) if kind.lower() == "bearer" else None

    def knows(self, headers: Headers) -> bool:
        """Return True if a request shows a token, or the cookie of a session that has not ended."""
        if "authorization" in headers:
            return self.shown_role(headers) is not None
        return self.session(headers) is not None

    def session(self, headers: Headers) -> Session | None:
        """Return the session of the cookie of a request; None without one, or where it has ended."""
        try:
            morsel = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        except CookieError:
            return None
        name, _, rest = ("" if morsel is None else morsel.value).partition(".")
        end, _, signature = rest.partition(".")
        if name not in self._tokens:
            return None
        role = Role(name)
        signed = _are_equal(signature, self._signature(role, f"session {role} {end}"))
        if not (signed and end.isascii() and end.isdigit() and int(end) > self._clock()):
            return None
        return Session(role, self._signature(role, f"form {role} {end}"))

    def _signature(self, role: Role, words: str) -> str:
        return hmac.new(self._tokens[role], words.encode("utf-8", "replace"), hashlib.sha256).hexdigest()


def may_act(session: Session | None, form_token: str) -> bool:
    """Return True if a form with this token comes from a page that an operator opened."""
    return session is not None and session.role is Role.OPERATOR and _are_equal(form_token, session.form_token)


def _are_equal(typed: str, right: str) -> bool:
    return hmac.compare_digest(typed.encode("utf-8", "replace"), right.encode())


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
