"""Constraints of a submission: `unique`, `unique_for`, `after`, and a task's rate.

With them a caller says which jobs a job waits for, or must not be equal to. The router writes them into the message's
header (`header_of`), so that `before_task_publish` sees them. The sender reads them there (`of_header`) and takes them
out again: they concern this submission, and neither a retry nor a replacement.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from celery import Celery
from celery.result import AsyncResult, ResultSet
from celery.utils.time import rate as parse_rate
from kombu.exceptions import EncodeError
from kombu.utils.json import dumps
from sqlalchemy.exc import SQLAlchemyError

from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.errors import InvalidRequest, NotAccepted, show
from celery_capacity.routing.inspect import job_events
from celery_capacity.routing.model.identifiers import check_job_id
from celery_capacity.routing.model.job import Constraints, Rate
from celery_capacity.routing.store.dependencies import KnownRate, known_rates, lift_rates, set_rate
from celery_capacity.workers.process.stores import Stores
from celery_capacity.workers.submit.validation import MAX_SECONDS, check_seconds

#: Options of `apply_async`. All but `after` are attributes of tasks too.
UNIQUE: Final = "unique"
UNIQUE_FOR: Final = "unique_for"
AFTER: Final = "after"
OPTIONS: Final = frozenset({UNIQUE, UNIQUE_FOR, AFTER})
#: Names in the header. Their values are [digest, seconds], ids, and [starts a second, the rate as it was written].
RATE: Final = "rate"
CARRIED: Final = frozenset({UNIQUE, AFTER, RATE})
#: Jobs that one job can wait for.
MAX_NEEDS: Final = 10_000
#: Seconds for which a sender trusts the rates that it read. A rate that is set at run time reaches it that late.
RATES_FOR: Final = 5.0
#: Seconds in which the end of a job is written, and seconds between two looks for it. Workers write ends in batches.
WRITTEN_WITHIN: Final = 5.0
LOOK_EVERY: Final = 0.005
#: Intervals of the duty (`due_interval`) for which unused starts are saved up, because no pass comes exactly in time.
BURST_INTERVALS: Final = 1.5

#: Constraints of a job that waits for nothing but its time and a worker.
NONE: Final = Constraints()

logger = logging.getLogger(__name__)

_DIGEST: Final = re.compile("[0-9a-f]{64}")


def declares(task: Any) -> bool:
    """Return True if a task declares a rate, `unique` or `unique_for`. None is an unknown task."""
    return bool(getattr(task, "rate_limit", None) or getattr(task, UNIQUE, None) or getattr(task, UNIQUE_FOR, None))


def header_of(name: str, args: Any, kwargs: Any, options: dict[str, Any], task: Any) -> dict[str, Any]:
    """Return the constraints of a call, or else of its task, for the header.

    Takes them out of the options. Raises `InvalidRequest`.
    """
    carried: dict[str, Any] = {}
    unique = options.pop(UNIQUE, None)
    unique_for = options.pop(UNIQUE_FOR, None)
    unique = getattr(task, UNIQUE, None) if unique is None else unique
    unique_for = getattr(task, UNIQUE_FOR, None) if unique_for is None else unique_for
    if unique is None and unique_for is not None:
        unique = True
    if unique is not None and unique is not False:
        carried[UNIQUE] = [key_of(name, args, kwargs, unique), _seconds(unique_for)]
    if needs := after_ids(options.pop(AFTER, None)):
        carried[AFTER] = needs
    rate = rate_of(getattr(task, "rate_limit", None), f"the declaration of task {name}: rate_limit")
    if rate is not None:
        carried[RATE] = [rate.per_second, rate.said]
    return carried


def key_of(name: str, args: Any, kwargs: Any, unique: Any) -> str:
    """Return the digest of a submission's key: no other job may have this key at the same time.

    A text is the caller's key, whatever the task. True stands for the task's name and its arguments, as JSON with
    sorted keys.
    """
    if unique is True:
        try:
            compared = "call:" + dumps([name, list(args or ()), dict(kwargs or {})], sort_keys=True)
        except (TypeError, ValueError, EncodeError, RecursionError) as error:
            raise InvalidRequest(
                f"unique=True of {name}: its arguments cannot be compared: {error}",
                value=args,
                advice="Give a text instead, such as unique='nightly report'.",
            ) from error
    elif isinstance(unique, str) and unique:
        compared = "key:" + unique
    else:
        raise InvalidRequest(
            f"unique={show(unique)} of {name} is not valid", value=unique, advice="It must be True, False or a text."
        )
    return hashlib.sha256(compared.encode("utf-8", "surrogatepass")).hexdigest()


def _seconds(value: Any) -> float:
    if value is None:
        return 0.0
    if check_seconds(value, UNIQUE_FOR) <= 0:
        advice = f"It must be a number of seconds above 0, at most {MAX_SECONDS}."
        raise InvalidRequest(f"unique_for {show(value)} is not valid", value=value, advice=advice)
    return float(value)


def after_ids(value: Any) -> list[str]:
    """Return the ids that `after` names. It may hold ids, results, results of groups, and lists of them."""
    job_ids: dict[str, None] = {}
    for job_id in _ids(value):
        job_ids[job_id] = None
        if len(job_ids) > MAX_NEEDS:
            advice = "Have a job in between that waits for a part of them."
            raise InvalidRequest(f"after names more than {MAX_NEEDS} jobs, the most that are possible", advice=advice)
    return list(job_ids)


def _ids(value: Any) -> Iterator[str]:
    if value is None:
        return
    if isinstance(value, str):
        yield check_job_id(value)
    elif isinstance(value, ResultSet):
        for result in value.results:
            yield from _ids(result)
    elif isinstance(value, AsyncResult):
        yield check_job_id(value.id)
    elif isinstance(value, (Sequence, set, frozenset)) and not isinstance(value, (bytes, bytearray)):
        for part in value:
            yield from _ids(part)
    else:
        advice = "It must be the ids or the results of jobs."
        raise InvalidRequest(f"after {show(value)} is not valid", value=value, advice=advice)


def rate_of(value: Any, what: str) -> Rate | None:
    """Parse a rate in Celery's forms (10, "10/s", "0.5/m", "100/h"). None for no rate. Raises `InvalidRequest`."""
    if value is None or value == "":
        return None
    try:
        per_second = math.nan if isinstance(value, bool) else float(parse_rate(value))
    except (TypeError, ValueError, KeyError, OverflowError):
        per_second = math.nan
    if not 0 <= per_second <= MAX_SECONDS:
        raise InvalidRequest(
            f"{what} {show(value)} is not valid", value=value, advice="It must be such as 10, '10/s', '10/m' or '10/h'."
        )
    return Rate(per_second, str(value)) if per_second else None


def burst_of(settings: Settings) -> float:
    """Return the seconds of a rate for which starts are saved up."""
    return max(1.0, settings.due_interval * BURST_INTERVALS)


def of_header(carried: Mapping[str, Any]) -> tuple[Constraints, Rate | None]:
    """Return the constraints in a header, and the rate that its task declares.

    Other programs make messages too, so the values are checked. Raises `InvalidRequest`.
    """
    key, key_for = carried.get(UNIQUE) or ("", 0.0)
    if key and not (isinstance(key, str) and _DIGEST.fullmatch(key)):
        raise InvalidRequest(f"the header's unique {show(key)} is not valid", value=key, advice="Leave it out.")
    carried_rate = carried.get(RATE)
    if carried_rate is not None and not (
        isinstance(carried_rate, Sequence) and len(carried_rate) == 2 and isinstance(carried_rate[1], str)
    ):
        raise InvalidRequest(
            f"the header's rate {show(carried_rate)} is not valid", value=carried_rate, advice="Leave it out."
        )
    rate = rate_of(carried_rate[0], "the header's rate") if carried_rate is not None else None
    return (
        Constraints(key=key, key_for=_seconds(key_for or None), after=tuple(after_ids(carried.get(AFTER)))),
        Rate(rate.per_second, carried_rate[1]) if rate is not None and carried_rate is not None else None,
    )


def declare_rates(app: Celery, stores: Stores) -> None:
    """Publish the rates that the tasks of a worker declare, for senders that do not have the tasks.

    Where Postgres does not take them, the first job of each task brings its rate.
    """
    declared = {
        name: rate_of(getattr(task, "rate_limit", None), f"the declaration of task {name}: rate_limit")
        for name, task in app.tasks.items()
    }
    try:
        with stores.engine.connect() as connection:
            lift_rates(connection, [name for name, rate in declared.items() if rate is None])
            for name, rate in sorted(declared.items()):
                if rate is not None:
                    set_rate(connection, name, rate, by_control=False)
    except SQLAlchemyError as error:
        logger.warning("the rate limits of this worker's tasks are not published: %s", type(error).__name__)


def until_written(stores: Stores, job: str) -> bool:
    """Wait for the end in Postgres of a job that has ended in the ledger.

    A client has a job's result before the row says that the job has ended. If this client submits an equal job, it
    means another one, and must not get the ended job.
    Returns False where the job has not ended. Raises `NotAccepted` where Postgres does not say so in time.
    """
    ledger_event = stores.sending.ask(lambda ledger: job_events.in_ledger(ledger.client, job))
    if ledger_event is None or not ledger_event.final:
        return False
    deadline, pause = time.monotonic() + WRITTEN_WITHIN, threading.Event()
    while True:
        try:
            with stores.engine.connect() as connection:
                row_event = job_events.in_postgres(connection, job)
        except SQLAlchemyError as error:
            raise NotAccepted(f"job {job} has the same key, and Postgres does not say if it has ended") from error
        if row_event is None or row_event.final:
            return True
        if row_event.rank > ledger_event.rank:
            # The job goes on, as Postgres decided. The ledger is behind.
            return False
        if time.monotonic() >= deadline:
            raise NotAccepted(f"job {job} has the same key and has ended, and Postgres does not say so yet")
        pause.wait(LOOK_EVERY)


class Rates:
    """Rates that hold in the cluster, as this process last read them, and the constraints of messages."""

    def __init__(self, stores: Stores) -> None:
        self._stores = stores
        self._known: dict[str, KnownRate] = {}
        self._until = 0.0

    def constraints(self, wire: dict[str, Any], header: str, may_ask: Callable[[], bool]) -> Constraints | None:
        """Return the constraints of a message's job: those in its header, and the rate of its task. None for none.

        The header's constraints are taken out of it. `may_ask` returns True if this thread may wait for Postgres.
        """
        constraints, declared, carried = NONE, None, wire[header]
        if not CARRIED.isdisjoint(carried):
            constraints, declared = of_header(carried)
            wire[header] = {name: value for name, value in carried.items() if name not in CARRIED}
            if wire.get("id") in constraints.after:
                advice = "Name other jobs."
                raise InvalidRequest(f"job {wire['id']} cannot wait for itself", value=wire["id"], advice=advice)
            if constraints.after and (wire.get("retries") or wire.get("replaced_task_nesting")):
                advice = "Send another job that waits, and return."
                raise InvalidRequest("a retry or a replacement cannot wait for others", value="after", advice=advice)
        rate = self._of(wire.get("task"), declared, may_ask)
        if rate is not None:
            return replace(constraints, rate=rate, burst=burst_of(self._stores.settings))
        return None if constraints is NONE or constraints == NONE else constraints

    def _of(self, name: Any, declared: Rate | None, may_ask: Callable[[], bool]) -> Rate | None:
        """Return the rate of a task.

        A rate that was set at run time comes first. Then comes the declaration in the sender's code, then any other
        declaration.
        """
        if time.monotonic() >= self._until and may_ask():
            self._read()
        cached = self._known.get(name)
        if cached is None or (declared is not None and not cached.by_control):
            return declared
        return cached.rate if cached.rate.per_second else None

    def forget(self) -> None:
        """Read the rates anew at their next use, because they have changed."""
        self._until = 0.0

    def _read(self) -> None:
        self._until = time.monotonic() + RATES_FOR
        try:
            with self._stores.engine.connect() as connection:
                self._known = known_rates(connection)
        except SQLAlchemyError:
            # The insert reports the error. The rates that were read before stay in use.
            return
