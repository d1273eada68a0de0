"""The addresses of Redis: which texts name one, and what each client is told of it.

::

    redis://[user[:password]@]host[:port][/number]
    rediss://…                                            with TLS; the server's certificate is verified
    unix://[user[:password]@]/path/to/socket[?db=number]
    sentinel://[user[:password]@]host[:port][/number];sentinel://…?master_name=name

A socket is kept as Celery writes it (`redis+socket:///path?virtual_host=number`, which is taken too), so that one text
serves redis-py, kombu and Celery's results. Of several Sentinels each is named; user, password and number are those of
the Redis that they watch, and `master_name` is how they call it. The text with it is what REDIS_URL, CELERY_BROKER_URL
and CELERY_RESULT_BACKEND all take.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Final
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from celery_capacity.routing.errors import InvalidRequest, show

REDIS_PORT: Final = 6379
SENTINEL_PORT: Final = 26379

#: The scheme of a Unix socket as redis-py calls it, and as Celery and kombu do.
SOCKETS: Final = ("unix", "redis+socket")
SENTINEL: Final = "sentinel"
#: Schemes whose URLs are kept as `Address.url` writes them; others stay as they were given.
KEPT_OTHERWISE: Final = ("unix", SENTINEL)
MASTER: Final = "master_name"
#: What stands between the addresses of several Sentinels.
BETWEEN: Final = ";"

_NUMBER: Final = re.compile(r"[0-9]{0,9}")
_RIGHT: Final = (
    "{env} must be like redis://host:6379/0 (rediss:// for TLS), unix:///path/to/socket?db=0, or"
    " sentinel://host:26379/0;sentinel://other:26379/0?master_name=name."
)


class WrongAddress(ValueError):
    """What is wrong with an address, without any part of it: it may hold a password."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a Redis is. `hosts`: with their ports, of the server or of the Sentinels; `path`: of a socket instead."""

    scheme: str
    hosts: tuple[tuple[str, int], ...]
    path: str = ""
    user: str | None = None
    password: str | None = None
    number: int = 0
    master: str = ""
    #: what else the URL says, such as `ssl_ca_certs`
    query: tuple[tuple[str, str], ...] = ()

    @property
    def url(self) -> str:
        """As redis-py, kombu and Celery understand it; see the top of this module for Sentinels."""
        login = ""
        if self.user is not None or self.password is not None:
            secret = "" if self.password is None else f":{quote(self.password, safe='')}"
            login = f"{quote(self.user or '', safe='')}{secret}@"
        query = list(self.query)
        if self.path:
            query += [("virtual_host", str(self.number))]
            return f"redis+socket://{login}{quote(self.path)}?{urlencode(query)}"
        places = [f"{self.scheme}://{login}{_bracketed(host)}:{port}/{self.number}" for host, port in self.hosts]
        if self.master:
            query += [(MASTER, self.master)]
        return BETWEEN.join(places) + (f"?{urlencode(query)}" if query else "")


def read(url: str) -> Address:
    """What a URL names. Raises ValueError for one that names no Redis: `WrongAddress` where there is more to say."""
    if url.startswith(f"{SENTINEL}://"):
        return _read_sentinels(url)
    parts = urlsplit(url)
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    login = _unquoted(parts.username), _unquoted(parts.password)
    if parts.scheme in SOCKETS:
        if parts.hostname or not parts.path.strip("/"):
            raise WrongAddress("a socket has a path from the root: unix:///path/to/socket")
        given = [query.pop(name) for name in ("db", "virtual_host") if name in query]
        number = _number(given[0].strip("/") if given else "")
        return Address("unix", (), unquote(parts.path), *login, number, query=tuple(query.items()))
    if parts.scheme not in ("redis", "rediss") or not parts.hostname or parts.port == 0:
        raise WrongAddress("no Redis is named")
    number = _number(query.pop("db", parts.path.removeprefix("/")))
    host = (parts.hostname, parts.port or REDIS_PORT)
    return Address(parts.scheme, (host,), "", *login, number, query=tuple(query.items()))


def _read_sentinels(url: str) -> Address:
    found: set[tuple[str | None, str | None, int]] = set()
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
        # Said once, at any of them, it holds for all.
        if any(login) or parts.path.strip("/"):
            found.add((*login, _number(parts.path.removeprefix("/"))))
    if len(found) > 1:
        raise WrongAddress("all Sentinels must name the same user, password and database")
    user, password, number = found.pop() if found else (None, None, 0)
    return Address(SENTINEL, tuple(hosts), "", user, password, number, master)


def _unquoted(text: str | None) -> str | None:
    return unquote(text) if text else None


def _number(text: str) -> int:
    if not _NUMBER.fullmatch(text):
        raise WrongAddress("a database is named by its number")
    return int(text or 0)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def numbered(url: str, number: int) -> str:
    """The same server, and another of its databases."""
    return replace(read(url), number=number).url


def check(value: str, env: str) -> str:
    """The value of REDIS_URL, as it is kept. Raises `InvalidRequest`."""
    found = _checked(value, env)
    if found.scheme == SENTINEL and not found.master:
        places = BETWEEN.join(f"{SENTINEL}://{_bracketed(host)}:{port}" for host, port in found.hosts)
        raise InvalidRequest(
            f"{env}={show(value)} does not say how the Sentinels call the Redis that they watch",
            value=value,
            advice=f"Add that name at the end: {places}?{MASTER}=name.",
        )
    return found.url if found.scheme in KEPT_OTHERWISE else verified(value, env)


def elsewhere(value: str, env: str) -> str:
    """The value of CELERY_BROKER_URL or CELERY_RESULT_BACKEND, as it is kept. It may name something else than Redis,
    and leave the name of the Redis behind Sentinels to Celery's own options."""
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
    """A rediss:// URL that says itself that the server's certificate is verified, which kombu does not do unasked."""
    if not value.startswith("rediss://") or "ssl_cert_reqs=" in value:
        return value
    return f"{value}{'&' if '?' in value else '?'}ssl_cert_reqs=required"
