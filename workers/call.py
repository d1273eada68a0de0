"""What a caller gives to `apply_async` and `send_task`, looked at before Celery does anything with it.

Celery would meet most of this half way, with an error of whatever line it failed in. What the message itself carries
is looked at once more by the sender, since others make messages too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import wraps
from numbers import Real
from typing import Any, Final

from kombu import Queue

from routing.errors import InvalidRequest, show
from routing.names import check_queue_name
from workers.queues import check_queue

#: Seconds from now, the furthest that a job may be put off (Celery's own bound).
MOST_SECONDS: Final = 2**31 - 1
#: Years within which times must be, so that every time zone can show them.
YEARS: Final = range(1900, 9999)
#: The most that a counter of retries or replacements may say (a column of Postgres).
MOST_TIMES: Final = 2**31 - 1


def checking(send_task: Callable[..., Any]) -> Callable[..., Any]:
    """An app's `send_task` that looks at the call first. Raises `InvalidRequest`."""

    @wraps(send_task)
    def checked(
        name: Any,
        args: Any = None,
        kwargs: Any = None,
        countdown: Any = None,
        eta: Any = None,
        *more: Any,
        **options: Any,
    ) -> Any:
        if not isinstance(name, str):
            raise _wrong("task name", name, "It must be text, such as 'tasks.add'.")
        if args and not isinstance(args, (list, tuple)):
            raise _wrong("args", args, "They must be a list or a tuple.")
        if kwargs and not isinstance(kwargs, Mapping):
            raise _wrong("kwargs", kwargs, "They must be a mapping.")
        if countdown:
            check_seconds(countdown, "countdown")
        if eta is not None and eta != "":
            eta = check_time(eta, "eta")
        for option in CHECKED & options.keys():
            if options[option] is not None:
                options[option] = _CHECKS[option](options[option])
        for stamp in options.get("stamped_headers") or ():
            if stamp not in options:
                raise _wrong("stamped_headers", stamp, "Each name in it must be given as an option too.")
        return send_task(name, args, kwargs, countdown, eta, *more, **options)

    return checked


def check_seconds(value: Any, what: str) -> Any:
    """A finite number of seconds."""
    try:
        # (NaN is in no range.)
        usable = not isinstance(value, bool) and -MOST_SECONDS <= float(_number(value)) <= MOST_SECONDS
    except OverflowError:
        usable = False
    if not usable:
        raise _wrong(what, value, f"It must be a number of seconds, at most {MOST_SECONDS}.")
    return value


def _number(value: Any) -> Any:
    """The value where it is a real number, else one that is in no range."""
    return value if isinstance(value, Real) else math.nan


def check_time(value: Any, what: str) -> datetime:
    """A time, given as one or as ISO 8601 text."""
    try:
        when = value if isinstance(value, datetime) else datetime.fromisoformat(value)
    except (TypeError, ValueError) as error:
        raise _wrong(what, value, "Pass a datetime or ISO 8601 text.") from error
    if when.year not in YEARS:
        raise _wrong(what, value, f"It must be in the years {YEARS[0]} to {YEARS[-1]}.")
    return when


def check_times(value: Any, what: str) -> int:
    """A counter in a message: how often it was retried or replaced."""
    if not value:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MOST_TIMES:
        raise _wrong(what, value, "It must be a whole number from 0.")
    return value


def check_time_limits(value: Any) -> None:
    """The header `timelimit`: [hard, soft], seconds or None each."""
    if value is None:
        return
    if not isinstance(value, (list, tuple)) or len(value) > 2:
        raise _wrong("timelimit", value, "It must be two numbers of seconds.")
    for limit, what in zip(value, ("time_limit", "soft_time_limit"), strict=False):
        if limit is not None and check_seconds(limit, what) < 0:
            raise _wrong(what, limit, "It must not be negative.")


def _expires(value: Any) -> Any:
    return check_seconds(value, "expires") if isinstance(value, Real) else check_time(value, "expires")


def _headers(value: Any) -> Any:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise _wrong("headers", value, "They must be a mapping of names to values.")
    return value


def _stamps(value: Any) -> Any:
    if not isinstance(value, (list, tuple, set, frozenset)) or not all(isinstance(name, str) for name in value):
        raise _wrong("stamped_headers", value, "It must be a list of names.")
    return value


def _queue(value: Any) -> Any:
    if isinstance(value, Queue):
        return check_queue(value)
    if not isinstance(value, str):
        raise _wrong("queue", value, "It must be a name, or a kombu Queue.")
    return check_queue_name(value)


_CHECKS: Final[Mapping[str, Callable[[Any], Any]]] = {
    "expires": _expires,
    "headers": _headers,
    "stamped_headers": _stamps,
    "queue": _queue,
}
CHECKED: Final = _CHECKS.keys()


def _wrong(what: str, value: Any, right: str) -> InvalidRequest:
    return InvalidRequest(f"{what} {show(value)} is not valid", value=value, advice=right)
