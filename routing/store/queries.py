"""Read jobs in Postgres: the newest jobs, a job with all its attempts, and ids like a wrong one.

A job that left for the archive is read there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from difflib import get_close_matches
from typing import Any, Final

from sqlalchemy import ColumnElement, Connection, Select, Table, func, null, select, union_all

from celery_capacity.routing.database import schema
from celery_capacity.routing.model.states import State

#: Newest jobs that are searched for an id like the wrong one.
LOOKED_AT: Final = 2000
#: Leading characters that two ids must share to be taken as beginning alike.
SHORTEST: Final = 4
#: Similarity of an id with a typing error, by difflib, 0 to 1. Two random UUIDs have some 0.5.
SIMILAR: Final = 0.8

_jobs = schema.jobs.c
_SHOWN: Final = (
    "id",
    "name",
    "state",
    "attempt",
    "worker",
    "priority",
    "request",
    "submitted_at",
    "admitted_at",
    "started_at",
    "finished_at",
    "error",
)
_DETAILS: Final = (
    "epoch",
    "declared",
    "queue",
    "retries",
    "losses",
    "root_id",
    "parent_id",
    "due_at",
    "expires_at",
)
_TRIES: Final = (
    "epoch",
    "attempt",
    "worker",
    "incarnation",
    "admitted_at",
    "started_at",
    "ended_at",
    "outcome",
    "error",
)


@dataclass(frozen=True, slots=True)
class JobLine:
    """A row of `jobs`, by column: the columns of the list, or all of them without the message."""

    columns: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.columns[name]

    def to_json(self) -> dict[str, Any]:
        """Return the columns for JSON: times in ISO 8601 UTC, the request in people's units."""
        return {name: plain(value) for name, value in self.columns.items()}


@dataclass(frozen=True, slots=True)
class JobFile:
    """A job with all its attempts, oldest first. `now`: Postgres's clock when it was read."""

    job: JobLine
    attempts: Sequence[JobLine]
    now: datetime

    def to_json(self) -> dict[str, Any]:
        return {**self.job.to_json(), "attempts": [attempt.to_json() for attempt in self.attempts]}


def plain(value: Any) -> Any:
    """Return a value of a column as JSON holds it."""
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat(timespec="milliseconds")
    return value


def newest(connection: Connection, state: State | None, limit: int) -> list[JobLine]:
    """Return at most `limit` jobs, the last submitted first. `state`: only jobs in this state; None: in all."""
    columns = (_jobs[name] for name in _SHOWN)
    query = select(*columns).where(_jobs.id.in_(_newest(state, limit))).order_by(_jobs.seq.desc())
    return [_line(row) for row in connection.execute(query)]


def _newest(state: State | None, limit: int) -> Select[Any]:
    """Return a query for the ids of the newest jobs.

    Each state is asked by itself: an index has the jobs of a state in order, so a million ended jobs are not sorted.
    """
    each = (
        select(_jobs.id, _jobs.seq).where(_jobs.state == member).order_by(_jobs.seq.desc()).limit(limit).subquery()
        for member in ([state] if state is not None else State)
    )
    ids = union_all(*(select(part.c.id, part.c.seq) for part in each)).subquery()
    return select(ids.c.id).order_by(ids.c.seq.desc()).limit(limit)


def count(connection: Connection, state: State | None) -> int:
    """Return the number of all jobs, or of the jobs in one state."""
    query = select(func.count()).select_from(schema.jobs)
    if state is not None:
        query = query.where(_jobs.state == state)
    return connection.execute(query).scalar_one()


def find(connection: Connection, job: str) -> JobFile | None:
    """Return a job by its id, else the newest job in the archive that had this id, else None."""
    # A role that may not read messages does not get their sizes either.
    readable = connection.execute(select(func.has_column_privilege("jobs", "message", "SELECT"))).scalar_one()
    live, gone = schema.jobs, schema.jobs_archive
    size = func.length(_jobs.message) if readable else null()
    query = select(*_columns(live), size.label("message_bytes")).where(_jobs.id == job)
    file = _file(connection, query, schema.attempts, schema.attempts.c.job_id == job)
    if file is not None:
        return file
    row = connection.execute(select(func.max(gone.c.seq)).where(gone.c.id == job)).scalar_one()
    kept = gone.c.message_bytes if readable else null()
    query = select(*_columns(gone), kept.label("message_bytes")).where(gone.c.seq == row)
    return _file(connection, query, schema.attempts_archive, schema.attempts_archive.c.job_seq == row)


def _columns(table: Table) -> list[ColumnElement[Any]]:
    return [table.c[name] for name in (*_SHOWN, *_DETAILS)]


def _file(connection: Connection, query: Select[Any], attempts: Table, own: ColumnElement[bool]) -> JobFile | None:
    """Return the job of a query with its attempts. `own`: the condition that selects them."""
    row = connection.execute(query.add_columns(func.clock_timestamp().label("now"))).one_or_none()
    if row is None:
        return None
    columns = dict(row._mapping)
    now = columns.pop("now")
    tries = select(*(attempts.c[name] for name in _TRIES)).where(own).order_by(attempts.c.epoch, attempts.c.attempt)
    return JobFile(JobLine(columns), [_line(row) for row in connection.execute(tries)], now)


def nearest(connection: Connection, job: str, most: int = 3) -> list[str]:
    """Return ids that a person may have meant, the likeliest first.

    They are ids of the newest jobs that begin like `job`, or are much like it as a whole.
    """
    recent = connection.execute(_newest(None, LOOKED_AT)).scalars().all()
    begun = {candidate: _agree(candidate, job) for candidate in recent}
    alike = [candidate for candidate in recent if begun[candidate] >= min(SHORTEST, len(job))]
    alike.sort(key=lambda candidate: -begun[candidate])
    similar = get_close_matches(job, recent, n=most, cutoff=SIMILAR)
    return list(dict.fromkeys([*alike, *similar]))[:most]


def _agree(left_id: str, right_id: str) -> int:
    """Return how many leading characters two ids have in common."""
    for position, (left, right) in enumerate(zip(left_id, right_id, strict=False)):
        if left != right:
            return position
    return min(len(left_id), len(right_id))


def _line(row: Any) -> JobLine:
    return JobLine(dict(row._mapping))
