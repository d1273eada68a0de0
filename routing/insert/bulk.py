"""Insert of many jobs at once: their rows go by COPY, in one statement and one commit.

All rows of one call are there, or none is. An existing id stops the whole call. Then the caller goes on with the single
inserts of `routing.insert.single`, which know how to treat such an id (a commit whose answer was lost, a successor).
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from operator import attrgetter
from typing import Any, Final

import psycopg2
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from celery_capacity.routing.database.postgres_errors import of_driver
from celery_capacity.routing.errors import NotMigrated
from celery_capacity.routing.insert.columns import COLUMNS
from celery_capacity.routing.insert.single import may_publish
from celery_capacity.routing.model.job import NewJob, Publisher
from celery_capacity.routing.model.states import Store

#: Rows of one statement. With so many, its round trip and its commit cost next to nothing. They take some 1 MB.
CHUNK: Final = 1000
#: Bytes that the driver takes from the text at once.
_BUFFER: Final = 1 << 20
#: SQLSTATE of an insert with an existing id.
_EXISTS: Final = "23505"
#: Columns in which each job differs. The jobs of one call have most of the other columns in common.
_OWN: Final = ("id", "root_id", "message")
_COMMON: Final = tuple(column for column in COLUMNS if column.name not in _OWN)
#: Values of a job from which the common columns are made.
_KIND: Final = attrgetter(
    *("name", "shape", "priority", "declared", "queue", "retries", "nesting", "parent_id", "due_at", "expires_at"),
    *("rerun", "replaces", "stamps", "expected_ms", "key_limits"),
)
_COPY: Final = f"COPY jobs ({', '.join([*_OWN, *(column.name for column in _COMMON)])}) FROM STDIN"
#: Characters that COPY's text form escapes.
_ESCAPES: Final = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})
_NULL: Final = "\\N"


@dataclass(frozen=True, slots=True)
class Committed:
    """Jobs that have a row. `seqs`: order of submission by id. `epoch`, `authority`: as Postgres says now."""

    seqs: Mapping[str, int]
    epoch: int
    authority: Store


def copy_jobs(connection: Connection, jobs: Sequence[NewJob], by: Publisher | None = None) -> bool:
    """Write the rows of new jobs in their order. Return False if the attempt `by` has lost its lease.

    With `by`, the rows go into the caller's transaction, and the attempt keeps its lease until the end of that
    transaction. Where the attempt has lost its lease, nothing is written. Raises `DBAPIError` (`is_known`),
    `NotMigrated`.
    """
    if by is not None and not _keeps_lease(connection, by):
        return False
    rows = io.StringIO("".join(_lines(jobs)))
    cursor = connection.connection.cursor()
    try:
        cursor.copy_expert(_COPY, rows, _BUFFER)
    except psycopg2.Error as error:
        raise of_driver(error, _COPY, connection.connection.driver_connection, connection.invalidate) from error
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
    return Committed(seqs, rows[0][0], Store(rows[0][1]))


_COMMITTED: Final = text(
    "SELECT a.epoch, a.authority, j.id, j.seq FROM authority a LEFT JOIN jobs j ON j.id = ANY(CAST(:ids AS text[]))"
)
_LOCK: Final = text("SELECT 1 FROM jobs WHERE id = :job FOR SHARE")


def _keeps_lease(connection: Connection, by: Publisher) -> bool:
    # A process that takes the job back changes its row, and waits for this transaction.
    connection.execute(_LOCK, {"job": by.job})
    return may_publish(connection, by)


def _lines(jobs: Iterable[NewJob]) -> Iterator[str]:
    """Yield the rows as COPY reads them. Jobs of one kind come one behind the other, or in turn with few others."""
    cached: dict[tuple[Any, ...], str] = {}
    for job in jobs:
        kind = _KIND(job)
        common = cached.get(kind)
        if common is None:
            common = cached[kind] = "\t".join(_text(_plain(column.value(job))) for column in _COMMON)
        yield f"{_text(job.id)}\t{_text(job.root_id)}\t\\\\x{job.message.hex()}\t{common}\n"


def _plain(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "t" if value else "f"
    return value.isoformat() if isinstance(value, datetime) else str(value)


def _text(value: str | None) -> str:
    return _NULL if value is None else value.translate(_ESCAPES) if "\\" in value or not value.isprintable() else value
