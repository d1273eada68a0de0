"""Addresses of Redis: the texts that name one, and the text that each client gets.

::

    redis://[user[:password]@]host[:port][/number]
    rediss://…                                            with TLS; the server's certificate is verified
    unix://[user[:password]@]/path/to/socket[?db=number]
    sentinel://[user[:password]@]host[:port][/number];sentinel://…?master_name=name

A socket is kept as Celery writes it: `redis+socket:///path?virtual_host=number`, which is accepted too. So one text
serves redis-py, kombu and Celery's results. Each of several Sentinels is named. User, password and number are those of
the Redis that they watch, and `master_name` is their name for it. REDIS_URL, CELERY_BROKER_URL and
CELERY_RESULT_BACKEND all take a text with that name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from celery_capacity.routing.errors import InvalidRequest, show

REDIS_PORT: Final = 6379
SENTINEL_PORT: Final = 26379

#: Schemes of a Unix socket: that of redis-py, and that of Celery and kombu.
SOCKETS: Final = ("unix", "redis+socket")
SENTINEL: Final = "sentinel"
#: Schemes whose URLs are kept as `Address.url` writes them; others stay as they were given.
KEPT_OTHERWISE: Final = ("unix", SENTINEL)
MASTER: Final = "master_name"
#: Separator of the addresses of several Sentinels.
BETWEEN: Final = ";"

_NUMBER: Final = re.compile(r"[0-9]{0,9}")
_RIGHT: Final = (
    "{env} must be like redis://host:6379/0 (rediss:// for TLS), unix:///path/to/socket?db=0, or"
    " sentinel://host:26379/0;sentinel://other:26379/0?master_name=name."
)


class WrongAddress(ValueError):
    """An address is wrong. The error's text has no part of the address, which may hold a password."""


@dataclass(frozen=True, slots=True)
class Address:
    """Address of a Redis. `hosts`: with ports, of the server or of the Sentinels; `path`: of a socket instead."""

    scheme: str
    hosts: tuple[tuple[str, int], ...]
    path: str = ""
    user: str | None = None
    password: str | None = None
    number: int = 0
    master: str = ""
    #: other parameters of the URL, such as `ssl_ca_certs`
    query: tuple[tuple[str, str], ...] = ()

    @property
    def url(self) -> str:
        """Return the URL for redis-py, kombu and Celery; see the top of this module for Sentinels."""
        login = ""
        if self.user is not None or self.password is not None:
            secret = "" if self.password is None else f":{quote(self.password, safe='')}"
            login = f"{quote(self.user or '', safe='')}{secret}@"
        query = list(self.query)
        if self.path:
            query += [("virtual_host", str(self.number))]
            return f"redis+socket://{login}{quote(self.path)}?{urlencode(query)}"
        urls = [f"{self.scheme}://{login}{_bracketed(host)}:{port}/{self.number}" for host, port in self.hosts]
        if self.master:
            query += [(MASTER, self.master)]
        return BETWEEN.join(urls) + (f"?{urlencode(query)}" if query else "")


def read(url: str) -> Address:
    """Return the address that a URL names.

    Raises ValueError where the URL names no Redis; that is `WrongAddress` where there is more to say.
    """
    if url.startswith(f"{SENTINEL}://"):
        return _read_sentinels(url)
    parts = urlsplit(url)
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    login = _unquoted(parts.username), _unquoted(parts.password)
    if parts.scheme in SOCKETS:
        if parts.hostname or not parts.path.strip("/"):
            raise WrongAddress("a socket has a path from the root: unix:///path/to/socket")
        numbers = [query.pop(name) for name in ("db", "virtual_host") if name in query]
        number = _number(numbers[0].strip("/") if numbers else "")
        return Address("unix", (), unquote(parts.path), *login, number, query=tuple(query.items()))
    if parts.scheme not in ("redis", "rediss") or not parts.hostname or parts.port == 0:
        raise WrongAddress("no Redis is named")
    number = _number(query.pop("db", parts.path.removeprefix("/")))
    host = (parts.hostname, parts.port or REDIS_PORT)
    return Address(parts.scheme, (host,), "", *login, number, query=tuple(query.items()))


def _read_sentinels(url: str) -> Address:
    logins: set[tuple[str | None, str | None, int]] = set()
    hosts: list[tuple[str, int]] = []
    master = ""
    for text in url.split(BETWEEN):
        parts = urlsplit(text)
        if parts.scheme != SENTINEL or not parts.hostname or parts.port == 0:
            raise WrongAddress("each address of several is a sentinel:// one")
        query = dict(parse_qsl(parts.query))
        master = query.pop(MASTER, master)
        if query:
            raise WrongAddress(f"Sentinels take no {', '.join(query)}")
        hosts.append((parts.hostname, parts.port or SENTINEL_PORT))
        login = _unquoted(parts.username), _unquoted(parts.password)
        # A login and a number at any one of the Sentinels hold for all.
        if any(login) or parts.path.strip("/"):
            logins.add((*login, _number(parts.path.removeprefix("/"))))
    if len(logins) > 1:
        raise WrongAddress("all Sentinels must name the same user, password and database")
    user, password, number = logins.pop() if logins else (None, None, 0)
    return Address(SENTINEL, tuple(hosts), "", user, password, number, master)


def _unquoted(text: str | None) -> str | None:
    return unquote(text) if text else None


def _number(text: str) -> int:
    if not _NUMBER.fullmatch(text):
        raise WrongAddress("a database is named by its number")
    return int(text or 0)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def check(value: str, env: str) -> str:
    """Return the value of REDIS_URL as it is kept. Raises `InvalidRequest`."""
    address = _checked(value, env)
    if address.scheme == SENTINEL and not address.master:
        urls = BETWEEN.join(f"{SENTINEL}://{_bracketed(host)}:{port}" for host, port in address.hosts)
        raise InvalidRequest(
            f"{env}={show(value)} does not say how the Sentinels call the Redis that they watch",
            value=value,
            advice=f"Add that name at the end: {urls}?{MASTER}=name.",
        )
    return address.url if address.scheme in KEPT_OTHERWISE else verified(value, env)


def elsewhere(value: str, env: str) -> str:
    """Return the value of CELERY_BROKER_URL or CELERY_RESULT_BACKEND as it is kept.

    The value may name something else than Redis. It may leave the name of the Redis behind Sentinels to Celery's own
    options.
    """
    if value.startswith(("unix://", f"{SENTINEL}://")):
        return _checked(value, env).url
    return verified(value, env)


def _checked(value: str, env: str) -> Address:
    try:
        return read(value)
    except ValueError as error:
        why = f": {error}" if isinstance(error, WrongAddress) else ""
        raise InvalidRequest(
            f"{env}={show(value)} is not valid{why}", value=value, advice=_RIGHT.format(env=env)
        ) from None


def verified(value: str, env: str) -> str:
    """Make a rediss:// URL ask for the verification of the server's certificate; kombu does not do it unasked."""
    if not value.startswith("rediss://") or "ssl_cert_reqs=" in value:
        return value
    return f"{value}{'&' if '?' in value else '?'}ssl_cert_reqs=required"
