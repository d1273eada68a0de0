"""Parsers of the values that settings have in the environment: each takes the text and the variable's name.

Each raises `InvalidRequest`, which names the variable, the wrong value and the rule for a right one.
"""

from __future__ import annotations

import re
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path

from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from celery_capacity.routing.errors import InvalidRequest, show
from celery_capacity.routing.model import amounts, identifiers
from celery_capacity.routing.model.expected import parse_duration
from celery_capacity.routing.policy.labels import parse_labels, parse_placement

#: times that may be 0, each with the meaning of that
ZERO = {
    "keep_finished": "never",
    "keep_archived": "ever",
    "keep_audit": "ever",
    "shutdown_grace": "no limit",
    "fail_infeasible_after": "never",
    "ageing": "no ageing",
    "share_halves_in": "no past use",
}

#: Fewest and most characters of a token.
SHORTEST_TOKEN = 16
LONGEST_TOKEN = 500

#: Most lines of a job's log that are kept.
MAX_KEPT_LINES = 10_000

#: How the lines of a log are written.
LOG_FORMATS = ("text", "json")

_MODULE = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*")


def plain_text(value: str, env: str) -> str:
    """Return the text as it is."""
    return value


def _wrong(env: str, value: str, right: str) -> InvalidRequest:
    return InvalidRequest(f"{env}={show(value)} is not valid", value=value, advice=right)


def log_format(value: str, env: str) -> str:
    """Return how the lines of a log are written."""
    if value.lower() not in LOG_FORMATS:
        raise _wrong(env, value, f"{env} must be one of: {', '.join(LOG_FORMATS)}.")
    return value.lower()


def kept_lines(value: str, env: str) -> int:
    """Return how many lines of each job are kept."""
    lines = amounts.parse_count_text(value, env)
    if lines > MAX_KEPT_LINES:
        raise _wrong(env, value, f"{env} must be from 0 to {MAX_KEPT_LINES}.")
    return lines


def token(value: str, env: str) -> str:
    """Return a token that nobody guesses, and that fits into a header. The error does not show it."""
    if not re.fullmatch(rf"[!-~]{{{SHORTEST_TOKEN},{LONGEST_TOKEN}}}", value):
        form = f"{SHORTEST_TOKEN} to {LONGEST_TOKEN} letters, digits and signs"
        advice = f"{env} must be {form}: `openssl rand -hex 24` makes one."
        raise InvalidRequest(f"{env} is not valid", advice=advice)
    return value


#: Headers that may carry the token or a password.
SECRET_HEADERS = ("authorization", "proxy-authorization", "cookie")


def header_name(value: str, env: str) -> str:
    """Return the name of a header of HTTP, in lower case."""
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9-]{0,63}", value):
        raise _wrong(env, value, f"{env} must be the name of a header, such as X-Forwarded-User.")
    if value.lower() in SECRET_HEADERS:
        raise _wrong(env, value, f"{env} must not be a header with a secret, such as {value}: the audit would show it.")
    return value.lower()


def database_url(value: str, env: str) -> str:
    """Return the URL with the driver that SQLAlchemy wants; Postgres's own tools and most hosts leave it out."""
    scheme, separator, rest = value.partition("://")
    if not separator or not rest or scheme not in ("postgres", "postgresql", "postgresql+psycopg2"):
        raise _wrong(env, value, f"{env} must be like postgresql://user@host:5432/name.")
    try:
        make_url(value)
    except (ArgumentError, ValueError):  # such as a port that is no number
        raise _wrong(env, value, f"{env} must be like postgresql://user@host:5432/name.") from None
    if rest.partition("?")[0].count("@") > 1:
        # The driver would take the rest of the password for a host, and say so in its error.
        raise _wrong(env, value, f"An @ in the user or the password of {env} is written %40.")
    return f"postgresql+psycopg2://{rest}"


def positive_cpus(value: str, env: str) -> int:
    """Return CPUs above 0 in millicores."""
    millicores = amounts.parse_cpus_text(value, env)
    if not millicores:
        raise _wrong(env, value, f"{env} must be above 0; a worker without CPUs is one that does not run.")
    return millicores


def memory(value: str, env: str) -> int:
    """Return an amount of memory in bytes."""
    return amounts.parse_memory(value, env)


def resources(value: str, env: str) -> dict[str, int]:
    """Return the counts of named resources, from `name=count` separated by commas."""
    counts: dict[str, int] = {}
    for part in filter(None, map(str.strip, value.split(","))):
        name, separator, count = (piece.strip() for piece in part.partition("="))
        if not separator:
            raise _wrong(env, value, f"{env} must be like licence=3,scratch=200.")
        amounts.refuse_standard(identifiers.check_resource_name(name, f"{env}: resource name"), env)
        if name in counts:
            raise _wrong(env, value, f"{name} stands there twice; name each resource once.")
        counts[name] = amounts.parse_count_text(count, f"{env}: {name}")
    most = amounts.MAX_NAMES - len(amounts.STANDARD)
    if len(counts) > most:
        raise _wrong(env, value, f"{env} may name at most {most} resources.")
    return counts


def labels(value: str, env: str) -> dict[str, str]:
    """Return labels, from `key=value` separated by commas."""
    return parse_labels(value, env)


def placement(value: str, env: str) -> str:
    """Return `pack` or `spread`."""
    return parse_placement(value.strip(), env)


def modules(value: str, env: str) -> tuple[str, ...]:
    """Return names of modules, separated by commas."""
    names = tuple(filter(None, map(str.strip, value.split(","))))
    for name in names:
        if not _MODULE.fullmatch(name):
            raise _wrong(env, name, f"{env} must be names of modules, separated by commas, such as tasks,jobs.nightly.")
    return names


def folder(value: str, env: str) -> Path:
    """Return an absolute path; `~` is the user's home."""
    try:
        path = Path(value).expanduser()
    except RuntimeError:  # "~stranger": no such user
        path = Path(value)
    if not path.is_absolute():
        raise _wrong(env, value, f"{env} must be an absolute path: commands from any folder share it.")
    return path


def address(value: str, env: str) -> tuple[str, int]:
    """Return (host, port)."""
    host, separator, port = value.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    usable = separator and bare and (":" not in bare or bare != host) and port.isascii() and port.isdigit()
    if not usable or len(port) > 5 or int(port) > 65535:
        raise _wrong(env, value, f"{env} must be host:port, such as 127.0.0.1:8000 or [::1]:8000.")
    return bare, int(port)


def seconds(value: str, env: str) -> float:
    """Return a number of seconds."""
    try:
        return float(value.replace("_", "?"))
    except ValueError as error:
        raise _wrong(env, value, f"{env} must be a number of seconds, such as 30 or 0.5.") from error


def switch(value: str, env: str) -> bool:
    """Return True for `on`, False for `off`."""
    if value.lower() not in ("on", "off"):
        raise _wrong(env, value, f"{env} must be on or off.")
    return value.lower() == "on"


def traces(value: str, env: str) -> bool:
    """Return True for `on`, False for `off`. Traces need OpenTelemetry."""
    is_on = switch(value, env)
    if is_on and not _is_installed("opentelemetry.propagate"):
        right = "Run `pip install 'celery-capacity[otel]'`, or leave the variable out."
        raise InvalidRequest(
            f"{env}={show(value)} needs OpenTelemetry, which is not installed", value=value, advice=right
        )
    return is_on


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # its package is missing
        return False


def lifetime(value: str, env: str) -> float | datetime:
    """Return a number of seconds from the start of a worker, or a time with its zone."""
    try:
        return parse_duration(value, env) / 1000
    except InvalidRequest:
        pass
    try:
        when = datetime.fromisoformat(value)
        return when if when.tzinfo is not None else when.astimezone()
    except (ValueError, OverflowError) as error:
        right = f"{env} must be a duration such as 7200 or 2h, or a time such as 2026-12-24T18:00:00+01:00."
        raise _wrong(env, value, right) from error
