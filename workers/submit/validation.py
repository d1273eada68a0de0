"""Checks of the arguments of `apply_async` and `send_task`, before Celery does anything with them.

Celery would find most of these errors half way, and report them by whatever line it failed in. The sender checks the
message itself once more, because other programs make messages too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from datetime import datetime, tzinfo
from functools import wraps
from numbers import Real
from typing import Any, Final

from celery import Celery
from kombu import Queue

from celery_capacity.routing.errors import InvalidRequest, PlatformError, show
from celery_capacity.routing.model.expected import LONGEST_MS, Limits
from celery_capacity.routing.model.identifiers import check_job_id, check_queue_name
from celery_capacity.routing.policy.placement import TOP_PRIORITY
from celery_capacity.routing.recovery.revocation import stamps_json
from celery_capacity.workers.broker.lazy_producer import SpareProducer
from celery_capacity.workers.broker.queues import check_queue

#: Seconds from now, the furthest that a job may be put off. Celery's own bound.
MAX_SECONDS: Final = 2**31 - 1
#: Years within which times must be, so that every time zone can show them.
YEARS: Final = range(1900, 9999)
#: The first parameters of Celery's `send_task`.
PARAMETERS: Final = ("name", "args", "kwargs", "countdown", "eta", "task_id", "producer", "connection")
#: Options by which other tasks follow a job.
FOLLOWED: Final = ("chain", "chord", "group_id", "link", "link_error")
#: Largest value of a counter of retries or replacements, by its column of Postgres.
MAX_TIMES: Final = 2**31 - 1


class SameJob(Exception):
    """Refusal of a submission (`refused`, its id) that is the same as an earlier one (`first`).

    Never reaches the caller, who gets the result of the first one.
    """

    def __init__(self, refused: str, first: str) -> None:
        super().__init__(f"{refused} is the same as {first}")
        self.refused = refused
        self.first = first


def checking(app: Celery) -> Callable[..., Any]:
    """Return the app's `send_task` with checks of the call in front.

    Of two submissions that must be one job, it gives the result of the first. It raises `InvalidRequest`. A refused
    call is counted: the ledger hears of it with a call that goes there anyway.
    """
    class_sender, instance_sender = _of_class(app), vars(app).get("send_task")

    @wraps(app.send_task)
    def checked(*given: Any, **options: Any) -> Any:
        spare = None
        try:
            call = {**dict(zip(PARAMETERS, given, strict=False)), **options}
            given = _check_call(call, given, options)
            # Other code, such as a test, may have replaced `send_task` since. It sees the call as it was made.
            current = _of_class(app)
            send_task = instance_sender or (
                current.__get__(app, type(app)) if hasattr(type(current), "__get__") else current
            )
            if current is class_sender and not any(call.get(key) for key in ("producer", "publisher", "connection")):
                spare = options["producer"] = SpareProducer(app)
            return send_task(*given, **options)
        except SameJob as same:
            return _first_result(app, same, options)
        except PlatformError as error:
            app.platform.tally.refuse(error)
            raise
        finally:
            if spare is not None:
                spare.release()

    return checked


def _check_call(call: Mapping[str, Any], given: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, ...]:
    """Check a call, and set its options to their checked values. Return the positional arguments, checked too."""
    name, args, kwargs, eta = call.get("name", ""), call.get("args"), call.get("kwargs"), call.get("eta")
    if not isinstance(name, str):
        raise _wrong("task name", name, "It must be text, such as 'tasks.add'.")
    if args and not isinstance(args, (list, tuple)):
        raise _wrong("args", args, "They must be a list or a tuple.")
    if kwargs and not isinstance(kwargs, Mapping):
        raise _wrong("kwargs", kwargs, "They must be a mapping.")
    if countdown := call.get("countdown"):
        check_seconds(countdown, "countdown")
    if eta is not None and eta != "":
        eta, place = check_time(eta, "eta"), PARAMETERS.index("eta")
        if len(given) > place:
            given = (*given[:place], eta, *given[place + 1 :])
        else:
            options["eta"] = eta
    for option in CHECKED & options.keys():
        if options[option] is not None:
            options[option] = _CHECKS[option](options[option])
    for stamp in options.get("stamped_headers") or ():
        if stamp not in options:
            raise _wrong("stamped_headers", stamp, "Each name in it must be given as an option too.")
    task = options.get("task_type")
    if "unique" in options or "unique_for" in options or (task is not None and is_unique(task)):
        _check_followed(name, options)
    return given


def _of_class(app: Celery) -> Any:
    """Return the `send_task` that an app's class has now, not bound."""
    return next(vars(cls)["send_task"] for cls in type(app).__mro__ if "send_task" in vars(cls))


def is_unique(task: Any) -> bool:
    """Return True if a task declares that equal submissions of it are one job."""
    declared = getattr(task, "unique", None)
    return declared is not False and bool(declared or getattr(task, "unique_for", None))


def _check_followed(name: str, options: Mapping[str, Any]) -> None:
    """Raise `InvalidRequest` for a unique job with a follower, in a chain, a group, a chord or by a link.

    Where the job turns out to be an earlier one, its follower is never called. A waiting caller would wait for ever.
    """
    unique = options.get("unique")
    by_call = unique is not None or options.get("unique_for") is not None
    if unique is False or not (by_call or is_unique(options.get("task_type"))) or options.get("retries"):
        return
    for what in FOLLOWED:
        # The last step of a chain has an empty chain: its id is that of the chain.
        if options.get(what) or (what == "chain" and options.get(what) is not None):
            raise InvalidRequest(
                f"{name} is unique, and is sent with {what}={show(options[what])}",
                value=what,
                advice="What is part of a canvas, or has a link, cannot be unique: submit it by itself.",
            )


def _first_result(app: Celery, same: SameJob, options: Mapping[str, Any]) -> Any:
    """Return the result that `send_task` gives for a submission that is an earlier one."""
    backend = app.backend
    if hasattr(backend, "remove_pending_result"):
        # Celery listens for the result of the id that it made, and no result will come under that id.
        backend.remove_pending_result(app.AsyncResult(same.refused))
    result = (options.get("result_cls") or app.AsyncResult)(same.first)
    result.ignored = options.get("ignore_result")
    parent = app.current_worker_task
    if parent and options.get("add_to_parent", True):
        parent.add_trail(result)
    return result


def check_seconds(value: Any, what: str) -> Any:
    """Return a value that is a finite number of seconds. Raises `InvalidRequest` for others."""
    try:
        # NaN is in no range.
        usable = not isinstance(value, bool) and -MAX_SECONDS <= float(_number(value)) <= MAX_SECONDS
    except OverflowError:
        usable = False
    if not usable:
        raise _wrong(what, value, f"It must be a number of seconds, at most {MAX_SECONDS}.")
    return value


def _number(value: Any) -> Any:
    """Return the value if it is a real number, or else NaN, which is in no range."""
    return value if isinstance(value, Real) else math.nan


def check_time(value: Any, what: str) -> datetime:
    """Return a time, given as a datetime or as ISO 8601 text. Raises `InvalidRequest`."""
    try:
        when = value if isinstance(value, datetime) else datetime.fromisoformat(value)
    except (TypeError, ValueError) as error:
        raise _wrong(what, value, "Pass a datetime or ISO 8601 text.") from error
    if when.year not in YEARS:
        raise _wrong(what, value, f"It must be in the years {YEARS[0]} to {YEARS[-1]}.")
    return when


def check_times(value: Any, what: str) -> int:
    """Return a counter in a message: how often the job was retried or replaced."""
    if not value:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_TIMES:
        raise _wrong(what, value, "It must be a whole number from 0.")
    return value


def check_time_limits(value: Any) -> None:
    """Check the header `timelimit`: [hard, soft], seconds or None each."""
    if value is None:
        return
    if not isinstance(value, (list, tuple)) or len(value) > 2:
        raise _wrong("timelimit", value, "It must be two numbers of seconds.")
    for limit, what in zip(value, ("time_limit", "soft_time_limit"), strict=False):
        if limit is not None and check_seconds(limit, what) < 0:
            raise _wrong(what, limit, "It must not be negative.")


def limits_of(task: Any) -> Limits:
    """Return the time limits of a task's own; of the configuration where it has none."""
    app = getattr(task, "app", None)
    limits = []
    for name in ("time_limit", "soft_time_limit"):
        value = getattr(task, name, None)
        limits.append(value if value is not None or app is None else app.conf.get(f"task_{name}"))
    check_time_limits(limits)
    return to_limits(limits)


def to_limits(value: Any) -> Limits:
    """Return the limits of a header `timelimit`, which `check_time_limits` took, in milliseconds."""
    hard, soft = (*(value or ()), None, None)[:2]
    return Limits(*(min(round((limit or 0) * 1000), LONGEST_MS) for limit in (hard, soft)))


def check_priority(value: Any) -> int:
    """Return the priority of a message; none is 0."""
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= TOP_PRIORITY:
        raise InvalidRequest(f"priority {show(value)} is not valid", value=value, advice="It must be 0 to 9, 9 first.")
    return value


def check_parent(value: Any) -> str | None:
    """Return the id of another task, as Celery passes it on."""
    return None if value is None else check_job_id(value)


def stamps_of(headers: Mapping[str, Any]) -> str | None:
    """Return the stamps of a message as JSON, None where its headers hold no valid ones.

    A message can be revoked by its stamps.
    """
    names, stamps = headers["stamped_headers"], headers.get("stamps")
    if not isinstance(names, (list, tuple)) or not isinstance(stamps, Mapping):
        return None
    return stamps_json(names, stamps)


def check_zoned(value: Any, what: str, zone: tzinfo) -> datetime | None:
    """Return a time of a message, None where there is none. `zone`: the zone of a time that names none."""
    if value is None:
        return None
    when = check_time(value, what)
    return when if when.tzinfo is not None else when.replace(tzinfo=zone)


def check_name(value: Any) -> str:
    """Return a task's name. Raises `InvalidRequest`."""
    if not isinstance(value, str) or not value or len(value) > 255 or not value.isprintable():
        raise InvalidRequest(
            f"task name {show(value)} is not valid",
            value=value,
            advice="It must be 1 to 255 printable characters.",
        )
    return value


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
