"""Accepting jobs in Postgres: the durable row, and what is published under an id that exists.

Each function is one guarded statement on the caller's connection, autocommitted unless the caller opened a transaction.
What an attempt publishes is refused once that attempt has lost its lease: the guard is in the insert itself.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, Final

import psycopg2
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from routing import roster
from routing.errors import NotMigrated
from routing.request import Request
from routing.states import FINAL, State, Step

_FINAL: Final = ", ".join(f"'{state.value}'" for state in sorted(FINAL))


@lru_cache(maxsize=4096)
def request_json(shape: str) -> str:
    """The column `request`: the shape in people's units, as JSON."""
    return json.dumps(Request.from_shape(shape).to_people())


@dataclass(frozen=True, slots=True)
class NewJob:
    """A job as it is submitted. `message` as `routing.message` makes it."""

    id: str
    name: str
    shape: str
    message: bytes
    priority: int = 0
    declared: bool = True
    queue: str = "celery"
    retries: int = 0
    nesting: int = 0
    #: The attempt of the same job that publishes this (a retry); None where nobody says.
    publisher: int | None = None
    #: False: its first lost attempt ends it.
    rerun: bool = True
    root_id: str | None = None
    parent_id: str | None = None
    #: The job in whose replacement (`Task.replace`) this is a step.
    replaces: str | None = None
    due_at: datetime | None = None
    expires_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Publisher:
    """The attempt that publishes. `incarnation`: the life of its worker."""

    job: str
    epoch: int
    attempt: int
    incarnation: str


@dataclass(frozen=True, slots=True)
class Inserted:
    """`seq`: the order of submission; None where the id existed. `epoch`, `authority`: as confirmed by this insert."""

    seq: int | None
    epoch: int
    authority: str


_COLUMNS: Final = (
    "id, name, state, shape, request, message, priority, declared, queue, retries, nesting, root_id, parent_id, "
    "due_at, expires_at, rerun, replaces"
)
_TYPES: Final = (
    "text, text, text, text, jsonb, bytea, smallint, bool, text, int, int, text, text, timestamptz, timestamptz, bool, "
    "text"
)
_VALUES: Final = ", ".join(f"${number}" for number in range(1, 18))
_RETURNING: Final = (
    "ON CONFLICT (id) DO NOTHING RETURNING seq, (SELECT epoch FROM authority), (SELECT authority FROM authority)"
)


@dataclass(frozen=True, slots=True)
class _Statement:
    """The hot path of every submit: prepared once for each connection, which halves its cost in Postgres."""

    name: str
    prepare: str
    execute: str


def _statement(name: str, types: str, source: str, values: int) -> _Statement:
    prepare = f"PREPARE {name} ({types}) AS INSERT INTO jobs ({_COLUMNS}) {source} {_RETURNING}"
    return _Statement(name, prepare, f"EXECUTE {name} ({', '.join(['%s'] * values)})")


_BY_ANYBODY: Final = _statement("celery_capacity_insert_job", _TYPES, f"VALUES ({_VALUES})", 17)
#: Whether an attempt (job, epoch, attempt, incarnation) may still speak: its row is there (and not in the archive), has
#: no newer attempt and did not take this one back or give it up, and its worker was not given up (which is noted before
#: its jobs are taken back).
_HOLDS: Final = (
    "EXISTS (SELECT 1 FROM jobs p WHERE p.id = {} AND "
    f"(p.epoch, p.attempt, CASE p.step WHEN {Step.GIVEN_UP.value} THEN {Step.BACK.value} ELSE p.step END) "
    f"< ({{}}, {{}}, {Step.BACK.value})) AND "
    "NOT EXISTS (SELECT 1 FROM workers w WHERE w.incarnation = {} AND w.status = 'lost')"
)
_BY_ATTEMPT: Final = _statement(
    "celery_capacity_insert_job_by",
    f"{_TYPES}, text, bigint, int, text",
    f"SELECT {_VALUES} WHERE {_HOLDS.format('$18', '$19', '$20', '$21')}",
    21,
)
#: SQLSTATEs: a table is missing; a prepared statement is not known (a pooler gave us another session).
_UNDEFINED_TABLE: Final = "42P01"
_NOT_PREPARED: Final = "26000"


def insert_job(connection: Connection, job: NewJob, by: Publisher | None = None) -> Inserted:
    """Make a job durable; an id that exists is left as it is (`seq` is None). Nothing is written either where the
    attempt that publishes it has lost its lease (`may_publish` tells). Raises `NotMigrated`."""
    state = State.SCHEDULED if job.due_at is not None else State.ACCEPTED
    values = (
        job.id,
        job.name,
        state.value,
        job.shape,
        request_json(job.shape),
        job.message,
        job.priority,
        job.declared,
        job.queue,
        job.retries,
        job.nesting,
        job.root_id,
        job.parent_id,
        job.due_at,
        job.expires_at,
        job.rerun,
        job.replaces,
    )
    try:
        if by is None:
            row = _execute_insert(connection, _BY_ANYBODY, values)
        else:
            row = _execute_insert(connection, _BY_ATTEMPT, (*values, by.job, by.epoch, by.attempt, by.incarnation))
    except DBAPIError as error:
        if getattr(error.orig, "pgcode", None) == _UNDEFINED_TABLE:
            raise NotMigrated() from error
        raise
    if row is None:
        return confirmed(connection)
    if row[1] is None:
        raise NotMigrated()
    return Inserted(row[0], row[1], row[2])


def confirmed(connection: Connection) -> Inserted:
    """Nothing was inserted; who decides, all the same."""
    known = roster.read_authority(connection)
    return Inserted(None, known.epoch, known.authority)


def _execute_insert(connection: Connection, statement: _Statement, values: tuple[Any, ...]) -> Any:
    """The row that the insert returns. With the driver's own cursor: SQLAlchemy's result machinery would be a fifth of
    the whole statement. Errors are SQLAlchemy's, and a connection that broke is given up, as it would do."""
    cursor = connection.connection.cursor()
    try:
        # SQLAlchemy keeps `info` with the connection to the server, for as long as that lives.
        if statement.name not in connection.info:
            cursor.execute(statement.prepare)
            connection.info[statement.name] = True
        try:
            cursor.execute(statement.execute, values)
        except psycopg2.Error as error:
            if error.pgcode != _NOT_PREPARED:
                raise
            cursor.execute(statement.prepare)
            cursor.execute(statement.execute, values)
        return cursor.fetchone()
    except psycopg2.Error as error:
        broken = bool(getattr(connection.connection.driver_connection, "closed", 0))
        if broken:
            connection.invalidate(error)
        raise DBAPIError.instance(
            statement.execute, None, error, psycopg2.Error, hide_parameters=True, connection_invalidated=broken
        ) from error
    finally:
        cursor.close()


def _if_replaced(column: str, value: str) -> str:
    """The row goes on with the publish where its attempt has ended by a replacement; else this waits beside it."""
    return f"{column} = CASE WHEN state = '{State.REPLACED.value}' THEN {value} ELSE {column} END"


def _unless_replaced(column: str, value: str) -> str:
    return f"{column} = CASE WHEN state <> '{State.REPLACED.value}' THEN {value} END"


# One statement, so that a row which becomes `replaced` meanwhile is looked at again by Postgres itself.
_SUCCESSOR: Final = text(f"""
UPDATE jobs SET
  {_if_replaced("message", ":message")},
  {_if_replaced("name", ":name")},
  {_if_replaced("rerun", ":rerun")},
  {_if_replaced("shape", ":shape")},
  {_if_replaced("request", "CAST(:request AS jsonb)")},
  {_if_replaced("retries", ":retries")},
  {_if_replaced("nesting", ":nesting")},
  {_if_replaced("priority", ":priority")},
  {_if_replaced("due_at", "CAST(:due_at AS timestamptz)")},
  {_if_replaced("expires_at", "CAST(:expires_at AS timestamptz)")},
  {_if_replaced("step", str(Step.BACK.value))},
  {_unless_replaced("successor", ":message")},
  {_unless_replaced("successor_shape", ":shape")},
  {_unless_replaced("successor_request", "CAST(:request AS jsonb)")},
  {_unless_replaced("successor_name", "CAST(:name AS text)")},
  {_unless_replaced("successor_rerun", "CAST(:rerun AS bool)")},
  {_unless_replaced("successor_retries", "CAST(:retries AS int)")},
  {_unless_replaced("successor_nesting", "CAST(:nesting AS int)")},
  {_unless_replaced("successor_priority", "CAST(:priority AS smallint)")},
  {_unless_replaced("successor_due_at", "CAST(:due_at AS timestamptz)")},
  {_unless_replaced("successor_expires_at", "CAST(:expires_at AS timestamptz)")},
  state = CASE WHEN state <> '{State.REPLACED.value}' THEN state
               WHEN CAST(:due_at AS timestamptz) IS NULL THEN '{State.ACCEPTED.value}'
               ELSE '{State.SCHEDULED.value}' END
WHERE id = :id AND state NOT IN ({_FINAL})
  AND (retries, nesting) < (:retries, :nesting)
  AND (CAST(:publisher AS int) IS NULL OR attempt <= CAST(:publisher AS int))
  AND (successor IS NULL OR (successor_retries, successor_nesting) < (:retries, :nesting))
RETURNING CASE WHEN successor IS NULL THEN '{State.REPLACED.value}' ELSE state END
""")


def put_successor(connection: Connection, job: NewJob) -> str | None:
    """Keep a publish under an existing id as the successor of its running attempt; a row whose attempt was replaced
    long ago goes on with it at once. (A publish is identified by id, retries and nesting; equal or lower is there
    already.) Returns the state that the row had, None where refused."""
    found = connection.execute(
        _SUCCESSOR,
        {
            "id": job.id,
            "message": job.message,
            "name": job.name,
            "rerun": job.rerun,
            "shape": job.shape,
            "request": request_json(job.shape),
            "retries": job.retries,
            "publisher": job.publisher,
            "nesting": job.nesting,
            "priority": job.priority,
            "due_at": job.due_at,
            "expires_at": job.expires_at,
        },
    ).scalar_one_or_none()
    return str(found) if found is not None else None


_MAY_PUBLISH: Final = text(f"SELECT {_HOLDS.format(':job', ':epoch', ':attempt', ':incarnation')}")


def may_publish(connection: Connection, by: Publisher) -> bool:
    """Whether an attempt holds its lease, as far as Postgres knows."""
    values = {"job": by.job, "epoch": by.epoch, "attempt": by.attempt, "incarnation": by.incarnation}
    return bool(connection.execute(_MAY_PUBLISH, values).scalar_one())


@dataclass(frozen=True, slots=True)
class Identity:
    """What tells one publish under an id from another."""

    seq: int
    state: str
    attempt: int
    retries: int
    nesting: int


def identity_of(connection: Connection, job: str) -> Identity | None:
    """The identity of a row, None where there is no such job."""
    row = connection.execute(
        text("SELECT seq, state, attempt, retries, nesting FROM jobs WHERE id = :id"), {"id": job}
    ).one_or_none()
    return Identity(*row) if row is not None else None
