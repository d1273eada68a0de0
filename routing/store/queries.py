"""Looking at jobs in Postgres: the newest ones, one with all its attempts (in the archive too), and ids that are like a
wrong one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from difflib import get_close_matches
from typing import Any, Final

from sqlalchemy import ColumnElement, Connection, Select, Table, func, null, select, union_all

from celery_capacity.routing.database import schema
from celery_capacity.routing.model.states import State

#: Newest jobs among which an id like the wrong one is looked for.
LOOKED_AT: Final = 2000
#: Characters in which two ids that begin alike agree.
SHORTEST: Final = 4
#: Likeness (of difflib, 0 to 1) of an id with a slip of the pen; two random UUIDs have some 0.5.
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
    columns = (_jobs[name] for name in _SHOWN)
    query = select(*columns).where(_jobs.id.in_(_newest(state, limit))).order_by(_jobs.seq.desc())
    return [_line(row) for row in connection.execute(query)]


def _newest(state: State | None, limit: int) -> Select[Any]:
    """The ids of the newest jobs. Asked of each state by itself: there they stand in an index in their order, and a
    million jobs that have ended are not sorted."""
    each = (
        select(_jobs.id, _jobs.seq).where(_jobs.state == one).order_by(_jobs.seq.desc()).limit(limit).subquery()
        for one in ([state] if state is not None else State)
    )
    found = union_all(*(select(one.c.id, one.c.seq) for one in each)).subquery()
    return select(found.c.id).order_by(found.c.seq.desc()).limit(limit)


def count(connection: Connection, state: State | None) -> int:
    """How many jobs there are in all, or of one state."""
    query = select(func.count()).select_from(schema.jobs)
    if state is not None:
        query = query.where(_jobs.state == state)
    return connection.execute(query).scalar_one()


def find(connection: Connection, job: str) -> JobFile | None:
    """One job by its id, None where there is none; of those in the archive that had this id, the newest."""
    # A role that may not read messages is not told how long they are either.
    readable = connection.execute(select(func.has_column_privilege("jobs", "message", "SELECT"))).scalar_one()
    live, gone = schema.jobs, schema.jobs_archive
    size = func.length(_jobs.message) if readable else null()
    query = select(*_columns(live), size.label("message_bytes")).where(_jobs.id == job)
    found = _file(connection, query, schema.attempts, schema.attempts.c.job_id == job)
    if found is not None:
        return found
    row = connection.execute(select(func.max(gone.c.seq)).where(gone.c.id == job)).scalar_one()
    kept = gone.c.message_bytes if readable else null()
    query = select(*_columns(gone), kept.label("message_bytes")).where(gone.c.seq == row)
    return _file(connection, query, schema.attempts_archive, schema.attempts_archive.c.job_seq == row)


def _columns(table: Table) -> list[ColumnElement[Any]]:
    return [table.c[name] for name in (*_SHOWN, *_DETAILS)]


def _file(connection: Connection, query: Select[Any], attempts: Table, own: ColumnElement[bool]) -> JobFile | None:
    """The job of a query, with those of the attempts that are its `own`."""
    row = connection.execute(query.add_columns(func.clock_timestamp().label("now"))).one_or_none()
    if row is None:
        return None
    columns = dict(row._mapping)
    now = columns.pop("now")
    tries = select(*(attempts.c[name] for name in _TRIES)).where(own).order_by(attempts.c.epoch, attempts.c.attempt)
    return JobFile(JobLine(columns), [_line(row) for row in connection.execute(tries)], now)


def nearest(connection: Connection, job: str, most: int = 3) -> list[str]:
    """Ids that a person may have meant, the likeliest first: those of the newest jobs that begin alike, or
    are much alike altogether."""
    recent = connection.execute(_newest(None, LOOKED_AT)).scalars().all()
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
