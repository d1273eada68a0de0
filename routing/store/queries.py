"""Read a job in Postgres with all its attempts. A job that left for the archive is read there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from sqlalchemy import ColumnElement, Connection, Select, TableClause, Text, cast, func, literal_column, null, select
from sqlalchemy.dialects.postgresql import ARRAY, aggregate_order_by

from celery_capacity.routing.database import schema
from celery_capacity.routing.model.request import Request, alternatives_to_show

_jobs = schema.jobs.c
#: Columns of a job in a list.
SHOWN: Final = (
    "id",
    "name",
    "state",
    "queue",
    "attempt",
    "worker",
    "priority",
    "request",
    "expected_ms",
    "submitted_at",
    "due_at",
    "admitted_at",
    "started_at",
    "finished_at",
    "error",
    "progress",
)
_DETAILS: Final = (
    "epoch",
    "declared",
    "retries",
    "losses",
    "root_id",
    "parent_id",
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
    """A job with all its attempts, oldest first. `now`: Postgres's clock when it was read.

    `alternatives`: the requests of which it needs one, in order; none where it has one request, or has taken one.
    """

    job: JobLine
    attempts: Sequence[JobLine]
    now: datetime
    alternatives: Sequence[Request] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            **self.job.to_json(),
            "alternatives": [request.to_people() for request in self.alternatives],
            "attempts": [attempt.to_json() for attempt in self.attempts],
        }


def plain(value: Any) -> Any:
    """Return a value of a column as JSON holds it."""
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat(timespec="milliseconds")
    return value


def may_read(connection: Connection, table: str) -> bool:
    """Return True if this role may read a table whole. A role that only submits reads a few columns of the jobs."""
    return bool(connection.execute(select(func.has_table_privilege(table, "SELECT"))).scalar_one())


def progress_of(connection: Connection, jobs: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the progress of those of these jobs that have reported any, by id, in the order of the ids."""
    query = select(_jobs.id, _PROGRESS.label("progress")).where(_jobs.id.in_(jobs), _jobs.progress.is_not(None))
    reported = {row[0]: row[1] for row in connection.execute(query)} if jobs else {}
    return {job: reported[job] for job in jobs if reported.get(job) is not None}


def find(connection: Connection, job: str) -> JobFile | None:
    """Return a job by its id, else the newest job in the archive that had this id, else None."""
    # A role that may not read messages does not get their sizes either.
    readable = connection.execute(select(func.has_column_privilege("jobs", "message", "SELECT"))).scalar_one()
    live, gone = schema.jobs, schema.jobs_archive
    size = func.length(_jobs.message) if readable else null()
    query = select(*columns(live), *_links(live), size.label("message_bytes"), _jobs.shape).where(_jobs.id == job)
    file = _file(connection, query, schema.attempts, schema.attempts.c.job_id == job)
    if file is not None:
        return file
    row = connection.execute(select(func.max(gone.c.seq)).where(gone.c.id == job)).scalar_one()
    kept = gone.c.message_bytes if readable else null()
    query = select(*columns(gone), *_links(gone), kept.label("message_bytes"), gone.c.shape).where(gone.c.seq == row)
    return _file(connection, query, schema.attempts_archive, schema.attempts_archive.c.job_seq == row)


def find_message(connection: Connection, job: str) -> bytes | None:
    """Return the message of a job; None for an archived one, and for a role that may not read messages."""
    readable = connection.execute(select(func.has_column_privilege("jobs", "message", "SELECT"))).scalar_one()
    if not readable:
        return None
    message = connection.execute(select(_jobs.message).where(_jobs.id == job)).scalar_one_or_none()
    return None if message is None else bytes(message)  # the driver gives a memoryview


#: Progress of the newest attempt: of one that the row does not know yet, that runs, or that ended the job. The archive
#: keeps none.
_PROGRESS: Final[ColumnElement[Any]] = literal_column(
    "CASE WHEN (jobs.epoch, jobs.attempt) < ((progress->>'epoch')::bigint, (progress->>'attempt')::int) OR"
    " (jobs.epoch, jobs.attempt) = ((progress->>'epoch')::bigint, (progress->>'attempt')::int)"
    " AND (finished_at IS NOT NULL OR state IN ('admitted', 'running')) THEN progress - '{epoch,attempt}'::text[] END"
)


def columns(table: TableClause, names: Sequence[str] = (*SHOWN, *_DETAILS)) -> list[ColumnElement[Any]]:
    """Return columns of the jobs or of the archive by their names, and of the progress what is true of the attempt.

    The archive keeps no progress.
    """
    progress = _PROGRESS if table is schema.jobs else null()
    return [progress.label(name) if name == "progress" else table.c[name] for name in names]


def _links(table: TableClause) -> list[ColumnElement[Any]]:
    """Return the job that a job repeats, and the jobs that repeat it, oldest first."""
    links = schema.retries.c
    retry_of = select(links.of_job).where(links.seq == table.c.seq).scalar_subquery()
    oldest_first = aggregate_order_by(links.job, links.made_at, links.seq)
    retries = select(func.array_agg(oldest_first)).where(links.of_seq == table.c.seq)
    empty = cast([], ARRAY(Text))
    return [retry_of.label("retry_of"), func.coalesce(retries.scalar_subquery(), empty).label("retried_as")]


def _file(
    connection: Connection, query: Select[Any], attempts: TableClause, own: ColumnElement[bool]
) -> JobFile | None:
    """Return the job of a query with its attempts. `own`: the condition that selects them."""
    row = connection.execute(query.add_columns(func.clock_timestamp().label("now"))).one_or_none()
    if row is None:
        return None
    values = dict(row._mapping)
    now, shape = values.pop("now"), values.pop("shape") or ""
    tries = select(*(attempts.c[name] for name in _TRIES)).where(own).order_by(attempts.c.epoch, attempts.c.attempt)
    lines = [_line(row) for row in connection.execute(tries)]
    return JobFile(JobLine(values), lines, now, alternatives_to_show(shape))


def _line(row: Any) -> JobLine:
    return JobLine(dict(row._mapping))
