"""Wait for the end of jobs, with bars on a terminal, and the exit code that says how they ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from celery_capacity.platform.console.terminal import Meter, Meters, talk
from celery_capacity.routing.inspect.job_events import JobEvent
from celery_capacity.routing.model.states import State
from celery_capacity.routing.recovery import revocation
from celery_capacity.routing.store import queries
from celery_capacity.workers.client import following
from celery_capacity.workers.process.exit_codes import Exit

if TYPE_CHECKING:
    from celery_capacity.workers.process.stores import Stores

#: Seconds between two drawings of the bars, whether events come or not.
TICK: Final = 1.0
#: Running jobs that have a bar of their own.
MAX_BARS: Final = 8
#: Characters of an id beside its bar.
ID_LENGTH: Final = 8
#: Ends of a job that somebody cancelled, or whose time was over.
WITHDRAWN: Final = frozenset({State.CANCELLED, State.EXPIRED})


@dataclass(frozen=True, slots=True)
class Awaited:
    """The last state of each awaited job, in the order in which the jobs were named."""

    events: Mapping[str, JobEvent]
    timed_out: bool

    @property
    def code(self) -> Exit:
        """Return the exit code: that of a failure, else of the time-out, else of a cancel."""
        states = {event.state for event in self.events.values() if event.final}
        if states & {State.FAILED, State.LOST}:
            return Exit.FAILED
        if self.timed_out:
            return Exit.TIMED_OUT
        return Exit.CANCELLED if states & WITHDRAWN else Exit.OK

    def to_json(self) -> list[dict[str, Any]]:
        return [event_json(event) for event in self.events.values()]


def event_json(event: JobEvent) -> dict[str, Any]:
    return {
        "id": event.job,
        "state": event.state.value,
        "ended": event.final,
        "attempt": event.attempt,
        "worker": event.worker,
    }


def wait_for(
    stores: Stores, ids: Sequence[str], timeout: float | None, line_of: Callable[[JobEvent], str] | None = None
) -> Awaited:
    """Wait until all these jobs have ended, or `timeout` seconds have passed. Print the line of each end."""
    last: dict[str, JobEvent] = {}
    console = talk()
    drawn = console.is_terminal
    next_drawing = time.monotonic()
    with Meters(console) as meters:
        try:
            for event in following.follow(stores, ids, timeout, tick=TICK if drawn else None):
                if event is not None:
                    last[event.job] = event
                    if event.final and line_of is not None:
                        meters.print(line_of(event))
                if drawn and time.monotonic() >= next_drawing:
                    meters.show(_meters(stores, ids, last))
                    next_drawing = time.monotonic() + TICK
        except TimeoutError:
            return Awaited(_with_workers(stores, {job: last[job] for job in ids if job in last}), timed_out=True)
    return Awaited(_with_workers(stores, {job: last[job] for job in ids}), timed_out=False)


def _with_workers(stores: Stores, events: Mapping[str, JobEvent]) -> Mapping[str, JobEvent]:
    """Add the workers of jobs that had come into their state before they were looked at, if Postgres answers."""
    unknown = [job for job, event in events.items() if event.worker is None]
    if not unknown:
        return events
    try:
        with stores.engine.connect() as connection:
            if not queries.may_read(connection, "jobs_archive"):
                return events
            rows = revocation.standing(connection, unknown)
    except (DBAPIError, PoolTimeout):
        return events
    named = {job: replace(events[job], worker=row.worker) for job, row in rows.items()}
    return {**events, **named}


def _meters(stores: Stores, ids: Sequence[str], last: Mapping[str, JobEvent]) -> list[Meter]:
    ended = sum(event.final for event in last.values())
    running = [job for job in ids if job in last and last[job].state is State.RUNNING][:MAX_BARS]
    try:
        with stores.engine.connect() as connection:
            bars = list(_progress_of(connection, running))
    except (DBAPIError, PoolTimeout):
        # The wait goes on while Postgres restarts.
        bars = []
    if len(ids) == 1 and bars:
        return bars
    states = ", ".join(dict.fromkeys(event.state.value for event in last.values() if not event.final))
    return [Meter("jobs", ended, len(ids), f"{ended} of {len(ids)} ended{f', {states}' if states else ''}"), *bars]


def _progress_of(connection: Connection, jobs: Sequence[str]) -> Iterable[Meter]:
    for job, progress in queries.progress_of(connection, jobs).items():
        current, total, message = progress["current"], progress["total"], progress["message"]
        amount = f"{current:g}" if total is None else f"{current:g} of {total:g}"
        yield Meter(job[:ID_LENGTH], current, total or current or 1, f"{amount}{f' {message}' if message else ''}")
