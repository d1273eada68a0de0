"""Looking at jobs in Postgres: the newest ones, one with all its attempts, and ids that are like a wrong
one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from difflib import get_close_matches
from typing import Any, Final

from sqlalchemy import Connection, Select, func, null, select

from routing import tables
from routing.states import State

#: Newest jobs among which an id like the wrong one is looked for.
LOOKED_AT: Final = 2000
#: Characters in which two ids that begin alike agree.
SHORTEST: Final = 4
#: Likeness (of difflib, 0 to 1) of an id with a slip of the pen; two random UUIDs have some 0.5.
SIMILAR: Final = 0.8

_jobs, _attempts = tables.jobs.c, tables.attempts.c
_SHOWN: Final = (
    _jobs.id,
    _jobs.name,
    _jobs.state,
    _jobs.attempt,
    _jobs.worker,
    _jobs.priority,
    _jobs.request,
    _jobs.submitted_at,
    _jobs.admitted_at,
    _jobs.started_at,
    _jobs.finished_at,
    _jobs.error,
)
_DETAILS: Final = (
    _jobs.epoch,
    _jobs.declared,
    _jobs.queue,
    _jobs.retries,
    _jobs.losses,
    _jobs.root_id,
    _jobs.parent_id,
    _jobs.due_at,
    _jobs.expires_at,
)
_TRIES: Final = (
    _attempts.epoch,
    _attempts.attempt,
    _attempts.worker,
    _attempts.incarnation,
    _attempts.admitted_at,
    _attempts.started_at,
    _attempts.ended_at,
    _attempts.outcome,
    _attempts.error,
)


@dataclass(frozen=True, slots=True)
class JobLine:
    """One row of `jobs`, by column: what the list shows, or all of it but the message."""

    columns: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.columns[name]

    def to_json(self) -> dict[str, Any]:
        """Times in ISO 8601 UTC, the request in people's units."""
        return {name: plain(value) for name, value in self.columns.items()}


@dataclass(frozen=True, slots=True)
class JobFile:
    """One job with all its attempts, oldest first. `now`: Postgres's clock when it was read."""

    job: JobLine
    attempts: Sequence[JobLine]
    now: datetime

    def to_json(self) -> dict[str, Any]:
        return {**self.job.to_json(), "attempts": [attempt.to_json() for attempt in self.attempts]}


def plain(value: Any) -> Any:
    """A value of a column as JSON holds it."""
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat(timespec="milliseconds")
    return value


def newest(connection: Connection, state: State | None, limit: int) -> list[JobLine]:
    """At most `limit` jobs, those submitted last first; only of one state where it is given."""
    query: Select[Any] = select(*_SHOWN).order_by(_jobs.seq.desc()).limit(limit)
    if state is not None:
        query = query.where(_jobs.state == state)
    return [_line(row) for row in connection.execute(query)]


def count(connection: Connection, state: State | None) -> int:
    """How many jobs there are in all, or of one state."""
    query = select(func.count()).select_from(tables.jobs)
    if state is not None:
        query = query.where(_jobs.state == state)
    return connection.execute(query).scalar_one()


def find(connection: Connection, job: str) -> JobFile | None:
    """One job by its id, None where there is none."""
    # A role that may not read messages is not told how long they are either.
    readable = connection.execute(select(func.has_column_privilege("jobs", "message", "SELECT"))).scalar_one()
    size = func.length(_jobs.message) if readable else null()
    row = connection.execute(
        select(*_SHOWN, *_DETAILS, size.label("message_bytes"), func.clock_timestamp().label("now")).where(
            _jobs.id == job
        )
    ).one_or_none()
    if row is None:
        return None
    columns = dict(row._mapping)
    now = columns.pop("now")
    tries = select(*_TRIES).where(_attempts.job_id == job).order_by(_attempts.epoch, _attempts.attempt)
    return JobFile(JobLine(columns), [_line(row) for row in connection.execute(tries)], now)


def nearest(connection: Connection, job: str, most: int = 3) -> list[str]:
    """Ids that a person may have meant, the likeliest first: those of the newest jobs that begin alike, or
    are much alike altogether."""
    recent = connection.execute(select(_jobs.id).order_by(_jobs.seq.desc()).limit(LOOKED_AT)).scalars().all()
    begun = {known: _agree(known, job) for known in recent}
    alike = [known for known in recent if begun[known] >= min(SHORTEST, len(job))]
    alike.sort(key=lambda known: -begun[known])
    similar = get_close_matches(job, recent, n=most, cutoff=SIMILAR)
    return list(dict.fromkeys([*alike, *similar]))[:most]


def _agree(one: str, other: str) -> int:
    """How many characters two ids have in common from their beginnings."""
    for place, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return place
    return min(len(one), len(other))


def _line(row: Any) -> JobLine:
    return JobLine(dict(row._mapping))
