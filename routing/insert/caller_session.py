"""Insert of jobs by a caller's own transaction: their rows are committed with it, or not at all.

The transaction is the caller's, on any driver. So nothing here commits, and nothing of the platform's own session holds
there: no search path, no prepared statements. A notification goes with the rows. A listening process brings them to the
ledger as soon as they are committed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Connection,
    DateTime,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    Table,
    Text,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB, insert
from sqlalchemy.types import TypeEngine

from celery_capacity.routing.database.schema import CHANNEL
from celery_capacity.routing.insert import columns
from celery_capacity.routing.model.job import NewJob

#: Jobs of one call that are named in notifications; of more jobs, a notification says only that there are some.
MAX_NAMED: Final = 20


@dataclass(frozen=True, slots=True)
class JobsTable:
    """Identity of the platform's table `jobs`, so that no other is taken for it. `server`: its start (seconds)."""

    server: str
    database: str
    schema: str
    table: int


_JOBS_TABLE: Final = text(
    "SELECT extract(epoch FROM pg_postmaster_start_time())::text, current_database()::text, n.nspname::text, "
    "c.oid::bigint FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = to_regclass('jobs')"
)
_IS_SAME_TABLE: Final = text(
    "SELECT coalesce(extract(epoch FROM pg_postmaster_start_time())::text = CAST(:server AS text) "
    "AND current_database()::text = CAST(:database AS text) "
    "AND (SELECT c.oid::bigint FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace "
    "WHERE n.nspname::text = CAST(:schema AS text) AND c.relname = 'jobs') = CAST(:table AS bigint), false)"
)
_NOTIFY: Final = text("SELECT pg_notify(CAST(:channel AS text), CAST(:payload AS text))")


def jobs_table(connection: Connection) -> JobsTable | None:
    """Return the identity of the table that the platform's own connection finds; None where there is none."""
    row = connection.execute(_JOBS_TABLE).one_or_none()
    return None if row is None else JobsTable(*row)


def is_same_table(connection: Connection, table: JobsTable) -> bool:
    """Return True if another connection leads to the same table."""
    values = {"server": table.server, "database": table.database, "schema": table.schema, "table": table.table}
    return bool(connection.execute(_IS_SAME_TABLE, values).scalar_one())


#: Types of the columns, by their names in Postgres: a caller's driver may ask for them.
_TYPES: Final[Mapping[str, TypeEngine[Any]]] = {
    "text": Text(),
    "jsonb": JSONB(none_as_null=True),
    "bytea": LargeBinary(),
    "smallint": SmallInteger(),
    "bool": Boolean(),
    "int": Integer(),
    "bigint": BigInteger(),
    "timestamptz": DateTime(timezone=True),
}
_JOBS: Final = Table(
    "jobs",
    MetaData(),
    *(Column(column.name, _TYPES[column.type]) for column in columns.COLUMNS),
    Column("seq", BigInteger),
)
_INSERT: Final = insert(_JOBS).on_conflict_do_nothing(index_elements=["id"]).returning(_JOBS.c.id, _JOBS.c.seq)


def insert_jobs(connection: Connection, table: JobsTable, jobs: Sequence[NewJob]) -> Mapping[str, int]:
    """Add rows to the caller's transaction, and a notification that is sent with its commit.

    Return the `seq` of each inserted job, by id. An existing id is left as it is.
    """
    options = {"schema_translate_map": {None: table.schema}}
    rows = connection.execute(_INSERT, [_row(job) for job in jobs], execution_options=options).all()
    written = {row[0]: row[1] for row in rows}
    ready = [job.id for job in jobs if job.starts and job.id in written]
    for payload in ready if len(ready) <= MAX_NAMED else [""]:
        connection.execute(_NOTIFY, {"channel": CHANNEL, "payload": payload})
    return written


def _row(job: NewJob) -> dict[str, Any]:
    row = columns.row(job)
    # SQLAlchemy makes the text of these columns itself.
    return row | {name: row[name] and json.loads(row[name]) for name in ("request", "stamps", "key_limits")}
