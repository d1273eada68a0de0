"""Insert of many jobs at once: their rows go by COPY, in one statement and one commit.

All rows of one call are there, or none is. An existing id stops the whole call. Then the caller goes on with the single
inserts of `routing.insert.single`, which know how to treat such an id (a commit whose answer was lost, a successor).
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Final

import psycopg2
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from celery_capacity.routing.database.postgres import NOT_THERE, is_lost
from celery_capacity.routing.errors import NotMigrated
from celery_capacity.routing.insert.single import may_publish, request_json
from celery_capacity.routing.model.job import NewJob, Publisher
from celery_capacity.routing.model.states import State

#: Rows of one statement: enough that its round trip and its commit do not count, at some 1 MB of memory.
CHUNK: Final = 1000
#: Bytes that the driver takes from the text at once.
_BUFFER: Final = 1 << 20
#: SQLSTATE of an insert with an existing id.
_EXISTS: Final = "23505"
#: Columns in the order of `_line`.
_COPY: Final = (
    "COPY jobs (id, root_id, message, name, state, shape, request, priority, declared, queue, retries, nesting, "
    "parent_id, due_at, expires_at, rerun, replaces, stamps) FROM STDIN"
)
#: Characters that COPY's text form escapes.
_ESCAPES: Final = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})
_NULL: Final = "\\N"


@dataclass(frozen=True, slots=True)
class Committed:
    """Jobs that have a row. `seqs`: order of submission by id. `epoch`, `authority`: as Postgres says now."""

    seqs: Mapping[str, int]
    epoch: int
    authority: str


def copy_jobs(connection: Connection, jobs: Sequence[NewJob], by: Publisher | None = None) -> bool:
    """Write the rows of new jobs in their order. Return False if the attempt `by` has lost its lease.

    With `by`, the rows go into the caller's transaction, and the attempt keeps its lease until the end of that
    transaction. Where the attempt has lost its lease, nothing is written. Raises `DBAPIError` (`is_known`),
    `NotMigrated`.
    """
    if by is not None and not _keeps_lease(connection, by):
        return False
    rows = io.StringIO("".join(map(_line, jobs)))
    cursor = connection.connection.cursor()
    try:
        cursor.copy_expert(_COPY, rows, _BUFFER)
    except psycopg2.Error as error:
        if error.pgcode in NOT_THERE:
            raise NotMigrated() from error
        broken = is_lost(error, connection.connection.driver_connection)
        if broken:
            connection.invalidate(error)
        raise DBAPIError.instance(
            _COPY, None, error, psycopg2.Error, hide_parameters=True, connection_invalidated=broken
        ) from error
    finally:
        cursor.close()
    return True


def is_known(error: DBAPIError) -> bool:
    """Return True if the error says that an id existed; then nothing was written."""
    return getattr(error.orig, "pgcode", None) == _EXISTS


def committed(connection: Connection, jobs: Sequence[NewJob]) -> Committed:
    """Return those of the jobs that have a row. Raises `NotMigrated`."""
    rows = connection.execute(_COMMITTED, {"ids": [job.id for job in jobs]}).all()
    if not rows:
        raise NotMigrated()
    seqs = {row[2]: row[3] for row in rows if row[2] is not None}
    return Committed(seqs, rows[0][0], rows[0][1])


_COMMITTED: Final = text(
    "SELECT a.epoch, a.authority, j.id, j.seq FROM authority a LEFT JOIN jobs j ON j.id = ANY(CAST(:ids AS text[]))"
)
_LOCK: Final = text("SELECT 1 FROM jobs WHERE id = :job FOR SHARE")


def _keeps_lease(connection: Connection, by: Publisher) -> bool:
    # A process that takes the job back changes its row, and waits for this transaction.
    connection.execute(_LOCK, {"job": by.job})
    return may_publish(connection, by)


def _line(job: NewJob) -> str:
    """Return a row as COPY reads it."""
    rest = _rest(
        job.name,
        job.shape,
        job.priority,
        job.declared,
        job.queue,
        job.retries,
        job.nesting,
        job.parent_id,
        job.due_at,
        job.expires_at,
        job.rerun,
        job.replaces,
        job.stamps,
    )
    return f"{_text(job.id)}\t{_text(job.root_id)}\t\\\\x{job.message.hex()}\t{rest}\n"


# Cached, since the jobs of one call have most of their columns in common.
@lru_cache(maxsize=1024)
def _rest(
    name: str,
    shape: str,
    priority: int,
    declared: bool,
    queue: str,
    retries: int,
    nesting: int,
    parent_id: str | None,
    due_at: datetime | None,
    expires_at: datetime | None,
    rerun: bool,
    replaces: str | None,
    stamps: str | None,
) -> str:
    state = State.ACCEPTED if due_at is None else State.SCHEDULED
    columns = (
        name,
        state.value,
        shape,
        request_json(shape),
        str(priority),
        _bool(declared),
        queue,
        str(retries),
        str(nesting),
        parent_id,
        _time(due_at),
        _time(expires_at),
        _bool(rerun),
        replaces,
        stamps,
    )
    return "\t".join(map(_text, columns))


def _text(value: str | None) -> str:
    return _NULL if value is None else value.translate(_ESCAPES) if "\\" in value or not value.isprintable() else value


def _bool(value: bool) -> str:
    return "t" if value else "f"


def _time(value: datetime | None) -> str | None:
    return None if value is None else value.isoformat()
