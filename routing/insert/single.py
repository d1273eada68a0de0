"""Acceptance of a job in Postgres: the durable row with its constraints.

See `successors` for a publish under an existing id. Each function is one guarded statement on the caller's connection,
autocommitted unless the caller opened a transaction. A publish of an attempt is refused once that attempt has lost its
lease: the guard is in the insert itself.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

import psycopg2
from psycopg2.extensions import TRANSACTION_STATUS_IDLE
from sqlalchemy import Connection, PoolProxiedConnection, text

from celery_capacity.routing.database import deadlines
from celery_capacity.routing.database.authority import read_authority
from celery_capacity.routing.database.postgres_errors import of_driver
from celery_capacity.routing.errors import InvalidRequest, NotMigrated, show
from celery_capacity.routing.insert import columns
from celery_capacity.routing.insert.columns import COLUMNS
from celery_capacity.routing.model.job import Constraints, Inserted, NewJob, Publisher
from celery_capacity.routing.model.states import State, Step, Store

_VALUES: Final = ", ".join(f"${number}" for number in range(1, len(COLUMNS) + 1))
_RETURNING: Final = "ON CONFLICT (id) DO NOTHING RETURNING seq, (SELECT epoch || ' ' || authority FROM authority)"


@dataclass(frozen=True, slots=True)
class Statement:
    """An insert, on the hot path of every submit: prepared once for each connection, which halves its cost there."""

    name: str
    prepare: str
    execute: str
    #: The insert as a plain statement, not prepared.
    plain: str
    #: Value for each %s in `prepare`, quoted by the driver; a statement with such values has no plain form.
    common: tuple[Any, ...] | None = None

    @classmethod
    def of(
        cls, name: str, columns: str, types: str, source: str, values: int, common: tuple[Any, ...] | None = None
    ) -> Statement:
        """Make a statement with `values` parameters.

        `source` gives the columns their values, by parameters of these types: $1, $2, ...
        """
        insert = f"INSERT INTO jobs ({columns}) {source} {_RETURNING}"
        # Behind a pooler a session may know the statements of others, so statements with equal names must be equal.
        name = f"{name}_{hashlib.sha256(json.dumps((types, insert, common)).encode()).hexdigest()[:16]}"
        execute = f"EXECUTE {name} ({', '.join(['%s'] * values)})"
        return cls(name, f"PREPARE {name} ({types}) AS {insert}", execute, re.sub(r"\$\d+", "%s", insert), common)


BY_ANYBODY: Final = Statement.of(
    "celery_capacity_insert_job", columns.NAMES, columns.TYPES, f"VALUES ({_VALUES})", len(COLUMNS)
)
#: SQL condition that an attempt (job, epoch, attempt, incarnation) may still speak. Its row is there (and not in the
#: archive), has no newer attempt, and did not take this attempt back or give it up. Its worker was not given up either,
#: which is noted before the worker's jobs are taken back.
_HOLDS: Final = (
    "EXISTS (SELECT 1 FROM jobs p WHERE p.id = {} AND "
    f"(p.epoch, p.attempt, CASE p.step WHEN {Step.GIVEN_UP.value} THEN {Step.BACK.value} ELSE p.step END) "
    f"< ({{}}, {{}}, {Step.BACK.value})) AND "
    "NOT EXISTS (SELECT 1 FROM workers w WHERE w.incarnation = {} AND w.status = 'lost')"
)
_ATTEMPT: Final = [f"${len(COLUMNS) + number}" for number in range(1, 5)]
_BY_ATTEMPT: Final = Statement.of(
    "celery_capacity_insert_job_by",
    columns.NAMES,
    f"{columns.TYPES}, text, bigint, int, text",
    f"SELECT {_VALUES} WHERE {_HOLDS.format(*_ATTEMPT)}",
    len(COLUMNS) + len(_ATTEMPT),
)
#: SQLSTATEs: a prepared statement is unknown, or is known already (a pooler gave us another session).
_NOT_PREPARED: Final = "26000"
_PREPARED: Final = "42P05"
#: How often a statement is prepared again: behind a pooler each message may go to another session.
_TRIES: Final = 5


def insert_job(connection: Connection, job: NewJob, by: Publisher | None = None) -> Inserted:
    """Make a job durable; an existing id is left as it is (`seq` is None).

    Nothing is written either where the attempt that publishes the job has lost its lease (`may_publish` tells).
    Raises `NotMigrated`.
    """
    if job.constraints is not None or job.key_limits is not None:
        return _insert_constrained(connection, job, job.constraints or Constraints(), by)
    return _insert(connection, job, by, plain=_is_in_transaction(connection))


def _is_in_transaction(connection: Connection) -> bool:
    driver: Any = connection.connection.driver_connection
    return not driver.autocommit or driver.get_transaction_status() != TRANSACTION_STATUS_IDLE


def values_of(job: NewJob, state: State | None = None, constrained: bool = False) -> tuple[Any, ...]:
    """Return the parameters of `BY_ANYBODY`. `state` replaces that of the job; a constraint keeps the time itself."""
    others: dict[str, Any] = {} if state is None else {"state": state.value}
    if constrained:
        others["due_at"] = None
    return columns.values(job, **others)


def _insert(
    connection: Connection,
    job: NewJob,
    by: Publisher | None,
    state: State | None = None,
    constrained: bool = False,
    plain: bool = False,
) -> Inserted:
    statement, values = BY_ANYBODY, values_of(job, state, constrained)
    if by is not None:
        statement, values = _BY_ATTEMPT, (*values, by.job, *by.token, by.incarnation)
    row = execute_insert(connection.connection, connection.invalidate, statement, values, plain)
    return confirmed(connection) if row is None else inserted_by(row, job)


def inserted_by(row: Any, job: NewJob) -> Inserted:
    """Return the result of an insert, from the row that the statement returned. Raises `NotMigrated`."""
    seq, confirmation = row
    if confirmation is None:
        raise NotMigrated()
    epoch, _, authority = confirmation.partition(" ")
    return Inserted(seq, int(epoch), Store(authority), job.starts)


def confirmed(connection: Connection) -> Inserted:
    """Return the result of an insert that wrote nothing; it says who decides all the same."""
    current = read_authority(connection)
    return Inserted(None, current.epoch, current.authority)


def execute_insert(
    pooled: PoolProxiedConnection,
    invalidate: Callable[[BaseException], None],
    statement: Statement,
    values: tuple[Any, ...],
    plain: bool = False,
) -> Any:
    """Execute an insert and return its row, None for none.

    The driver's own cursor executes it: SQLAlchemy's result machinery would be a fifth of the whole statement. Errors
    are those of SQLAlchemy. `plain`: not prepared, since in a
    transaction an unknown prepared statement would end the transaction. Raises `NotMigrated`.
    """
    cursor: Any = None
    try:
        cursor = pooled.cursor()
        if plain:
            cursor.execute(statement.plain, values)
            return cursor.fetchone()
        # SQLAlchemy keeps `info` with the connection to the server, for as long as that lives.
        if statement.name not in pooled.info:
            _prepare(cursor, statement)
            pooled.info[statement.name] = True
        for tries_left in range(_TRIES, -1, -1):
            try:
                cursor.execute(statement.execute, values)
                break
            except psycopg2.Error as error:
                if error.pgcode != _NOT_PREPARED or not tries_left:
                    raise
            _prepare(cursor, statement)
        return cursor.fetchone()
    except psycopg2.Error as error:
        raise of_driver(error, statement.execute, pooled.driver_connection, invalidate) from error
    finally:
        if cursor is not None:
            cursor.close()


def _prepare(cursor: Any, statement: Statement) -> None:
    try:
        cursor.execute(statement.prepare, statement.common)
    except psycopg2.Error as error:
        deadlines.nothing_written(error)
        # A statement is known already where a signal (a time limit, say) raised its error after the server's answer,
        # and where a pooler gave us another session.
        if error.pgcode != _PREPARED:
            raise


# -- constraints

_CLAIM_KEY: Final = text("SELECT claim_key(:key, :job, :seconds)")
_CONSTRAIN: Final = text("SELECT unknown, starts FROM gate_job(:job, CAST(:after AS text[]), :rated, :not_before)")
#: Statement by which a rate lets jobs go; returns their ids.
OPEN_RATE: Final = text("SELECT open_rate(:name, :rate, :said, :burst, :most)")
#: Jobs of a task that one call lets go.
MAX_LET_GO: Final = 1000
#: Statement by which limits by key let jobs go; returns their ids.
OPEN_KEYS: Final = text("SELECT open_keys(CAST(:keys AS text[]), :burst, :most)")


class _NotInserted(Exception):
    """Raised to leave the transaction, which wrote nothing."""

    def __init__(self, inserted: Inserted) -> None:
        self.inserted = inserted


def _insert_constrained(
    connection: Connection, job: NewJob, constraints: Constraints, by: Publisher | None
) -> Inserted:
    """Insert a job with its constraints, in one transaction.

    Raises `InvalidRequest` where a job that it needs is unknown. A publish under an existing id, such as a retry,
    passes no constraint.
    """
    waits = bool(constraints.after) or constraints.rate is not None
    try:
        with _in_one(connection):
            if constraints.key and not (job.retries or job.nesting):
                values = {"key": constraints.key, "job": job.id, "seconds": constraints.key_for}
                holder = connection.execute(_CLAIM_KEY, values).scalar_one()
                if holder != job.id:
                    current = read_authority(connection)
                    raise _NotInserted(Inserted(None, current.epoch, current.authority, False, str(holder)))
            state = State.SCHEDULED if waits or not job.starts else State.ACCEPTED
            inserted = _insert(connection, job, by, state, constrained=waits, plain=True)
            if inserted.seq is None:
                raise _NotInserted(inserted)
            if waits:
                inserted = _constrain(connection, job, constraints, inserted)
            if job.key_limits is not None:
                # Last, because this locks the keys until the commit, and before any lock of a rate.
                inserted = replace(inserted, starts=job.id in open_keys(connection, [job], constraints.burst))
    except _NotInserted as why:
        return why.inserted
    if constraints.rate is not None:
        went = _goes_at_once(connection, job, constraints)
        return inserted if job.key_limits is not None else replace(inserted, starts=went)
    return inserted


def _constrain(connection: Connection, job: NewJob, constraints: Constraints, inserted: Inserted) -> Inserted:
    values = {
        "job": job.id,
        "after": list(constraints.after),
        "rated": constraints.rate is not None,
        "not_before": job.due_at,
    }
    unknown, starts = connection.execute(_CONSTRAIN, values).one()
    if unknown and not constraints.tolerant:
        raise InvalidRequest(
            f"after: {show(unknown[0])} is not the id of a job",
            value=unknown[0],
            advice="Submit the jobs that this one needs first, and give their ids or results.",
        )
    return replace(inserted, starts=starts)


def _goes_at_once(connection: Connection, job: NewJob, constraints: Constraints) -> bool:
    """Return True if the rate of its task lets the job go now.

    Other jobs that the rate lets go in its place are due, and come as due jobs.
    """
    assert constraints.rate is not None
    rate = {"name": job.name, "rate": constraints.rate.per_second, "said": constraints.rate.said}
    return (
        job.id
        in connection.execute(OPEN_RATE, {**rate, "burst": constraints.burst, "most": MAX_LET_GO}).scalars().all()
    )


def open_keys(connection: Connection, jobs: Sequence[NewJob], burst: float = 1.0) -> set[str]:
    """Let jobs go that the limits of these jobs' keys let start now; return their ids.

    Other jobs that go in the place of these are due, and come as due jobs.
    """
    keys = sorted({key for job in jobs for key in json.loads(job.key_limits or "{}")})
    values = {"keys": keys, "burst": burst, "most": MAX_LET_GO}
    return set(connection.execute(OPEN_KEYS, values).scalars())


@contextmanager
def _in_one(connection: Connection) -> Iterator[None]:
    """Run the body as one transaction: its own where statements are autocommitted, else a part of the caller's."""
    driver: Any = connection.connection.driver_connection
    if not driver.autocommit:
        with connection.begin_nested():
            yield
        return
    try:
        connection.exec_driver_sql("BEGIN")
        yield
    except BaseException as error:
        deadlines.nothing_written(error)
        if not connection.invalidated:
            connection.exec_driver_sql("ROLLBACK")
        raise
    connection.exec_driver_sql("COMMIT")


_MAY_PUBLISH: Final = text(f"SELECT {_HOLDS.format(':job', ':epoch', ':attempt', ':incarnation')}")


def may_publish(connection: Connection, by: Publisher) -> bool:
    """Return True if an attempt holds its lease, as far as Postgres knows."""
    values = {"job": by.job, **by.token.columns(), "incarnation": by.incarnation}
    return bool(connection.execute(_MAY_PUBLISH, values).scalar_one())
