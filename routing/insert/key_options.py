"""Limits by key as callers and tasks write them: `limit={"customer:42": 2}` and `rate={"customer:42": "10/m"}`.

The router writes them into the message's header (`header_of`), so that `before_task_publish` sees them. The sender
reads them there (`of_wire`) and takes them out: the row alone has them (`routing.insert.key_limits`), and a retry keeps
those of its job.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, Final

from celery_capacity.routing.errors import InvalidRequest, show

#: Options of `apply_async`, and attributes of tasks.
LIMIT: Final = "limit"
RATE: Final = "rate"
OPTIONS: Final = frozenset({LIMIT, RATE})
#: Name in the header. Its value: {key: {"most": jobs at once, "per_second": starts, "said": the rate as written}}.
CARRIED: Final = "key_limits"
#: Keys of one job, characters of a key, and jobs of a key at once.
MAX_KEYS: Final = 8
MAX_KEY: Final = 255
MAX_AT_ONCE: Final = 1_000_000
#: Starts a second of the slowest rate, one a year, and of the fastest.
MIN_PER_SECOND: Final = 1 / (366 * 86400)
MAX_PER_SECOND: Final = 1_000_000.0
_SECONDS: Final = {"s": 1, "m": 60, "h": 3600}

_KEY_ADVICE: Final = f"It must be 1 to {MAX_KEY} printable characters, such as 'customer:42'."
_RATE_ADVICE: Final = "It must be such as 10, '10/s', '10/m' or '10/h', and at least one a year."


def declares(task: Any) -> bool:
    """Return True if a task declares limits by key. None is an unknown task."""
    return bool(getattr(task, LIMIT, None) or getattr(task, RATE, None))


def header_of(name: str, args: Any, kwargs: Any, options: dict[str, Any], task: Any) -> dict[str, Any]:
    """Return the limits of a call, or else of its task, for the header. Takes them out of the options.

    A task may declare a function of its arguments, which returns the mapping. Raises `InvalidRequest`.
    """
    if not OPTIONS.isdisjoint(options) and options.get("retries"):
        advice = "Leave it out: a retry keeps the limits of its job."
        raise InvalidRequest(f"a retry of {name} cannot change its limits by key", value=LIMIT, advice=advice)
    limits: dict[str, dict[str, Any]] = {}
    for option, add in ((LIMIT, _add_limit), (RATE, _add_rate)):
        called = options.pop(option, None)
        what = f"{option}= of {name}" if called is not None else f"the declaration of task {name}: {option}"
        value = called if called is not None else _declared(task, option, args, kwargs, what)
        if value is None or value is False:
            continue
        if not isinstance(value, Mapping):
            example = "{'customer:42': 2}" if option == LIMIT else "{'customer:42': '10/m'}"
            advice = f"It must be a mapping such as {example}, or False for none."
            raise InvalidRequest(f"{what}: {show(value)} is not valid", value=value, advice=advice)
        for key, bound in value.items():
            add(limits.setdefault(check_key(key, what), {}), bound, f"{what}, key {show(key)}:")
    return {CARRIED: _bounded(limits, name)} if limits else {}


def of_wire(wire: dict[str, Any], header: str) -> str | None:
    """Return the limits in the header of a message as JSON with sorted keys, None for none. Takes them out.

    Other programs make messages too, so the values are checked. Raises `InvalidRequest`.
    """
    carried = wire[header]
    if CARRIED not in carried:
        return None
    wire[header] = {name: value for name, value in carried.items() if name != CARRIED}
    value, what = carried[CARRIED], f"the header's {CARRIED}"
    if not isinstance(value, Mapping) or not all(isinstance(fields, Mapping) and fields for fields in value.values()):
        raise InvalidRequest(f"{what} {show(value)} is not valid", value=value, advice="Leave it out.")
    limits: dict[str, dict[str, Any]] = {}
    for key, fields in value.items():
        limit = limits[check_key(key, what)] = {}
        if (most := fields.get("most")) is not None:
            _add_limit(limit, most, f"{what}, key {show(key)}:")
        if (rate := fields.get("per_second")) is not None:
            _add_rate(limit, rate, f"{what}, key {show(key)}:")
            limit["said"] = str(fields.get("said"))[:MAX_KEY]
        if not limit:
            raise InvalidRequest(f"{what}, key {show(key)} has no limit", value=fields, advice="Leave it out.")
    return json.dumps(_bounded(limits, str(wire.get("task"))), sort_keys=True) if limits else None


def check_key(key: Any, what: str) -> str:
    """Return a key. Raises `InvalidRequest` for any but 1 to 255 printable characters."""
    if not isinstance(key, str) or not 1 <= len(key) <= MAX_KEY or not key.isprintable():
        raise InvalidRequest(f"{what}: the key {show(key)} is not valid", value=key, advice=_KEY_ADVICE)
    return key


def check_at_once(value: Any, what: str) -> int:
    """Return a number of jobs at once. Raises `InvalidRequest`."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_AT_ONCE:
        advice = f"It must be a whole number of jobs, 1 to {MAX_AT_ONCE}."
        raise InvalidRequest(f"{what} {show(value)} is not a valid limit", value=value, advice=advice)
    return value


def _add_limit(limit: dict[str, Any], value: Any, what: str) -> None:
    limit["most"] = check_at_once(value, what)


def _add_rate(limit: dict[str, Any], value: Any, what: str) -> None:
    per_second = _per_second(value)
    if not MIN_PER_SECOND <= per_second <= MAX_PER_SECOND:
        raise InvalidRequest(f"{what} {show(value)} is not a valid rate", value=value, advice=_RATE_ADVICE)
    limit["per_second"], limit["said"] = per_second, str(value)


def _per_second(value: Any) -> float:
    """Return the starts a second of a rate in Celery's forms (10, "10/s", "0.5/m", "100/h"); NaN for no rate."""
    number, _, unit = value.partition("/") if isinstance(value, str) else (value, "", "")
    if isinstance(value, bool) or not isinstance(value, (int, float, str)) or (unit or "s") not in _SECONDS:
        return math.nan
    try:
        return float(number) / _SECONDS[unit or "s"]
    except (ValueError, OverflowError):
        return math.nan


def _bounded(limits: dict[str, dict[str, Any]], name: str) -> dict[str, dict[str, Any]]:
    if len(limits) > MAX_KEYS:
        advice = f"A job has at most {MAX_KEYS} keys."
        raise InvalidRequest(f"{name} has limits of {len(limits)} keys", value=len(limits), advice=advice)
    return limits


def _declared(task: Any, option: str, args: Any, kwargs: Any, what: str) -> Any:
    value = getattr(task, option, None)
    if not callable(value):
        return value
    # Celery makes the function an attribute of the task's class, and so a method.
    function: Callable[..., Any] = getattr(value, "__func__", value)
    try:
        return function(*(args or ()), **(kwargs or {}))
    except Exception as error:
        raise InvalidRequest(
            f"{what}: it raised {type(error).__name__}: {error}",
            advice="It gets the arguments of the call, and returns a mapping or None.",
        ) from error
