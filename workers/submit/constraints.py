"""What a caller says that a job waits for or must not be equal to: `unique`, `unique_for`, `after`, and a task's rate.

The router writes it into the message's header (`header_of`), so that `before_task_publish` sees it; the sender reads it
there (`of_header`) and takes it out again: it concerns this submission, and neither a retry nor a replacement.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
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
from celery_capacity.routing.model.job import Gates, Rate
from celery_capacity.routing.store.dependencies import KnownRate, known_rates, lift_rates, set_rate
from celery_capacity.workers.process.stores import Stores
from celery_capacity.workers.submit.validation import MOST_SECONDS, check_seconds

#: Options of `apply_async`, and attributes of tasks but for `after`.
UNIQUE: Final = "unique"
UNIQUE_FOR: Final = "unique_for"
AFTER: Final = "after"
OPTIONS: Final = frozenset({UNIQUE, UNIQUE_FOR, AFTER})
#: The names in the header, whose values are [digest, seconds], ids, and [starts a second, as it was written].
RATE: Final = "rate"
CARRIED: Final = frozenset({UNIQUE, AFTER, RATE})
#: Jobs that one can wait for.
MOST_NEEDS: Final = 10_000
#: Seconds for which a sender trusts the rates that it read: so long a rate that is set at run time takes to be known.
RATES_FOR: Final = 5.0
#: Seconds in which the end of a job is written, and between looks at whether it is (a worker writes ends in batches).
WRITTEN_WITHIN: Final = 5.0
LOOK_EVERY: Final = 0.005
#: Intervals of the duty for which starts are saved up, since none of its passes comes exactly in time.
BURST_INTERVALS: Final = 1.5

#: A job that waits for nothing but its time and a worker.
NONE: Final = Gates()

logger = logging.getLogger(__name__)

_DIGEST: Final = re.compile("[0-9a-f]{64}")


def declares(task: Any) -> bool:
    """Whether a task (None: an unknown one) says something of it."""
    return bool(getattr(task, "rate_limit", None) or getattr(task, UNIQUE, None) or getattr(task, UNIQUE_FOR, None))


def header_of(name: str, args: Any, kwargs: Any, options: dict[str, Any], task: Any) -> dict[str, Any]:
    """What a call says, and else its task; taken out of the options. Raises `InvalidRequest`."""
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
    """The digest under which a submission is the only one: of the caller's text, whatever the task, or (True) of the
    task's name and its arguments, as JSON with sorted keys."""
    if unique is True:
        try:
            said = "call:" + dumps([name, list(args or ()), dict(kwargs or {})], sort_keys=True)
        except (TypeError, ValueError, EncodeError, RecursionError) as error:
            raise InvalidRequest(
                f"unique=True of {name}: its arguments cannot be compared: {error}",
                value=args,
                advice="Give a text instead, such as unique='nightly report'.",
            ) from error
    elif isinstance(unique, str) and unique:
        said = "key:" + unique
    else:
        raise InvalidRequest(
            f"unique={show(unique)} of {name} is not valid", value=unique, advice="It must be True, False or a text."
        )
    return hashlib.sha256(said.encode("utf-8", "surrogatepass")).hexdigest()


def _seconds(value: Any) -> float:
    if value is None:
        return 0.0
    if check_seconds(value, UNIQUE_FOR) <= 0:
        advice = f"It must be a number of seconds above 0, at most {MOST_SECONDS}."
        raise InvalidRequest(f"unique_for {show(value)} is not valid", value=value, advice=advice)
    return float(value)


def after_ids(value: Any) -> list[str]:
    """The ids that `after` names: ids, results, results of groups, and lists of them."""
    found: dict[str, None] = {}
    for one in _ids(value):
        found[one] = None
        if len(found) > MOST_NEEDS:
            advice = "Have a job in between that waits for a part of them."
            raise InvalidRequest(f"after names more than {MOST_NEEDS} jobs, the most that are possible", advice=advice)
    return list(found)


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
    """A rate as Celery has it (10, "10/s", "0.5/m", "100/h"); None where there is none. Raises `InvalidRequest`."""
    if value is None or value == "":
        return None
    try:
        per_second = math.nan if isinstance(value, bool) else float(parse_rate(value))
    except (TypeError, ValueError, KeyError, OverflowError):
        per_second = math.nan
    if not 0 <= per_second <= MOST_SECONDS:
        raise InvalidRequest(
            f"{what} {show(value)} is not valid", value=value, advice="It must be such as 10, '10/s', '10/m' or '10/h'."
        )
    return Rate(per_second, str(value)) if per_second else None


def burst_of(settings: Settings) -> float:
    """For how many seconds of a rate starts are saved up."""
    return max(1.0, settings.due_interval * BURST_INTERVALS)


def of_header(carried: Mapping[str, Any]) -> tuple[Gates, Rate | None]:
    """The gates in a header, and the rate that its task declares. Whoever wrote it: others make messages too."""
    key, key_for = carried.get(UNIQUE) or ("", 0.0)
    if key and not (isinstance(key, str) and _DIGEST.fullmatch(key)):
        raise InvalidRequest(f"the header's unique {show(key)} is not valid", value=key, advice="Leave it out.")
    said = carried.get(RATE)
    if said is not None and not (isinstance(said, Sequence) and len(said) == 2 and isinstance(said[1], str)):
        raise InvalidRequest(f"the header's rate {show(said)} is not valid", value=said, advice="Leave it out.")
    rate = rate_of(said[0], "the header's rate") if said is not None else None
    return (
        Gates(key=key, key_for=_seconds(key_for or None), after=tuple(after_ids(carried.get(AFTER)))),
        Rate(rate.per_second, said[1]) if rate is not None and said is not None else None,
    )


def declare_rates(app: Celery, stores: Stores) -> None:
    """Publish the rates that the tasks of a worker declare, for senders that do not have the tasks. (Where Postgres
    does not take them, the first job of each task brings its rate.)"""
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
    """Wait for the row of a job that the ledger knows to have ended: its result is out before, and whoever has that
    submits another job, not the same once more. False where the job has not ended. Raises `NotAccepted`."""
    known = stores.sending.ask(lambda ledger: job_events.in_ledger(ledger.client, job))
    if known is None or not known.final:
        return False
    deadline, pause = time.monotonic() + WRITTEN_WITHIN, threading.Event()
    while True:
        try:
            with stores.engine.connect() as connection:
                written = job_events.in_postgres(connection, job)
        except SQLAlchemyError as error:
            raise NotAccepted(f"whether job {job}, which has the same key, has ended is not known") from error
        if written is None or written.final:
            return True
        if written.rank > known.rank:
            # It goes on: by what Postgres decided, the ledger is behind.
            return False
        if time.monotonic() >= deadline:
            raise NotAccepted(f"job {job} has the same key and has ended, and Postgres does not say so yet")
        pause.wait(LOOK_EVERY)


class Rates:
    """The rates that hold in the cluster, as this process last read them, and with them what a message waits for."""

    def __init__(self, stores: Stores) -> None:
        self._stores = stores
        self._known: dict[str, KnownRate] = {}
        self._until = 0.0

    def gates(self, wire: dict[str, Any], header: str, may_ask: bool) -> Gates | None:
        """What the job of a message waits for, by its header, from which that is taken, and by the rate of its task.
        `may_ask`: this thread may wait for Postgres."""
        gates, declared, carried = NONE, None, wire[header]
        if not CARRIED.isdisjoint(carried):
            gates, declared = of_header(carried)
            wire[header] = {name: value for name, value in carried.items() if name not in CARRIED}
            if wire.get("id") in gates.after:
                advice = "Name other jobs."
                raise InvalidRequest(f"job {wire['id']} cannot wait for itself", value=wire["id"], advice=advice)
            if gates.after and (wire.get("retries") or wire.get("replaced_task_nesting")):
                advice = "Send another job that waits, and return."
                raise InvalidRequest("a retry or a replacement cannot wait for others", value="after", advice=advice)
        rate = self._of(wire.get("task"), declared, may_ask)
        if rate is not None:
            return replace(gates, rate=rate, burst=burst_of(self._stores.settings))
        return None if gates is NONE or gates == NONE else gates

    def _of(self, name: Any, declared: Rate | None, may_ask: bool) -> Rate | None:
        """The rate of a task: as it was set at run time, or else as the sender's code declares it, or else as somebody
        declared it."""
        if may_ask and time.monotonic() >= self._until:
            self._read()
        known = self._known.get(name)
        if known is None or (declared is not None and not known.by_control):
            return declared
        return known.rate if known.rate.per_second else None

    def forget(self) -> None:
        """They have changed."""
        self._until = 0.0

    def _read(self) -> None:
        self._until = time.monotonic() + RATES_FOR
        try:
            with self._stores.engine.connect() as connection:
                self._known = known_rates(connection)
        except SQLAlchemyError:
            # The insert says what is wrong, and what was read before serves on.
            return
