"""Insert of a job's row, the step that makes the job durable.

The commit dominates the cost of a submission; everything around it must be cheap. Most jobs are held back by no
constraint and published by no attempt. For these a process keeps one connection, instead of checking one out of the
pool each time. A job without unusual values is inserted by a statement that names only its own columns, because each
parameter of a prepared statement costs something at each execution. A kind of job that comes often has a statement of
its own, with its common values in it.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any, Final

import psycopg2
from sqlalchemy import Engine, PoolProxiedConnection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from celery_capacity.routing.database import deadlines
from celery_capacity.routing.database.postgres_errors import one_line
from celery_capacity.routing.errors import NotAccepted, OutcomeUnknown, mask_url
from celery_capacity.routing.insert import single, successors
from celery_capacity.routing.insert.columns import request_json
from celery_capacity.routing.model.job import Inserted, NewJob, Publisher
from celery_capacity.routing.model.states import State

_COLUMNS: Final = "id, name, state, shape, request, message, priority, declared, queue, expected_ms, root_id"
#: Insert of any job without unusual values.
_SIMPLE: Final = single.Statement.of(
    "celery_capacity_insert_simple_job",
    _COLUMNS,
    "text, text, text, jsonb, bytea, smallint, bool, text, bigint",
    f"VALUES ($1, $2, '{State.ACCEPTED.value}', $3, $4, $5, $6, $7, $8, $9, $1)",
    9,
)
#: Jobs after which a kind is common, and has a statement of its own with two parameters.
_COMMON: Final = 8
#: Kinds whose jobs are counted.
_COUNTED: Final = 256
#: Kinds that may have a statement, which costs the server some ten kB each.
_MAX_KINDS: Final = 32

#: Values that jobs of one kind have in common, in the order of `_SIMPLE`: name, shape, request, priority, declared,
#: queue, expected_ms.
_Kind = tuple[str, str, str, int, bool, str, int]


def _is_simple(job: NewJob) -> bool:
    """Return True if a job leaves all other columns at their defaults."""
    return (
        job.root_id == job.id
        and job.rerun
        and not (job.retries or job.nesting or job.parent_id or job.replaces or job.stamps)
        and job.due_at is None
        and job.expires_at is None
        and job.key_limits is None
    )


def _general(job: NewJob) -> tuple[single.Statement, tuple[Any, ...]]:
    return single.BY_ANYBODY, single.values_of(job)


def _own_statement(kind: _Kind) -> single.Statement:
    """Return the insert of jobs of one kind, with all their common values in it."""
    source = f"VALUES ($1, %s, '{State.ACCEPTED.value}', %s, %s, $2, %s, %s, %s, %s, $1)"
    return single.Statement.of("celery_capacity_insert_own_job", _COLUMNS, "text, bytea", source, 2, common=kind)


class Inserter:
    """Inserter of jobs by a connection of its own, which `engine` makes and does not keep.

    A second thread that comes meanwhile takes a connection of the pool `others`. So does a job that an attempt
    publishes, or that a constraint holds back. Thread-safe; not carried over a fork.
    """

    def __init__(self, engine: Engine, others: Engine) -> None:
        self._engine = engine
        self._others = others
        self._free = threading.Lock()
        self._connection: PoolProxiedConnection | None = None
        #: True: the connection is made anew before its next use.
        self._doubted = False
        #: How often jobs of each kind came, and the statements of the common kinds.
        self._came: dict[_Kind, int] = {}
        self._own: dict[_Kind, single.Statement] = {}

    def insert(self, job: NewJob, by: Publisher | None = None, *, tolerant: bool = False) -> Inserted:
        """Make a job durable, and try once more on another connection where the first connection broke.

        `by`: the attempt that publishes the job. An existing id goes to `successors.publish_again`, with `tolerant`.
        Raises `NotAccepted` where nothing was written, `OutcomeUnknown` where the row may be there, and `NotMigrated`.
        """
        try:
            return self._insert(job, by, tolerant)
        except PoolTimeout as error:
            raise NotAccepted(f"no connection to Postgres was free for job {job.id}") from error
        except DBAPIError as error:
            if not error.connection_invalidated or deadlines.unsent(error):
                raise NotAccepted(f"Postgres refused job {job.id}: {mask_url(one_line(error))}") from error
            self.doubt_connections()
            if deadlines.left() <= 0:
                why = f"Postgres did not answer in time while job {job.id} was stored; it may have been accepted"
                raise OutcomeUnknown(job.id, why) from error
        # The connection was lost around the commit. To repeat the statement on a new connection is safe: a row that is
        # there already is left as it is.
        try:
            return self._insert(job, by, tolerant)
        except (PoolTimeout, DBAPIError) as error:
            raise OutcomeUnknown(job.id) from error

    def doubt_connections(self) -> None:
        """Replace the unused connections to Postgres after one broke, because a restart of the server breaks all.

        Waits for nobody.
        """
        # SQLAlchemy does this where it sees the error itself. `dispose` would leave the connections that others use
        # now to a pool that nobody empties.
        self._others.pool._invalidate(None)  # type: ignore[arg-type]
        self._doubted = True

    def _insert(self, job: NewJob, by: Publisher | None, tolerant: bool) -> Inserted:
        if by is None and job.constraints is None and job.key_limits is None and self._free.acquire(blocking=False):
            try:
                if self._doubted:
                    self._doubted = False
                    self._give_up(None)
                connected = self._connection or self._connect()
                statement, values = self._simple(job) if _is_simple(job) else _general(job)
                row = single.execute_insert(connected, self._give_up, statement, values)
            finally:
                self._free.release()
            if row is not None:
                return single.inserted_by(row, job)
        with self._others.connect() as connection:
            inserted = single.insert_job(connection, job, by)
            if inserted.seq is None and inserted.same_as is None:
                return replace(inserted, existing=successors.publish_again(connection, job, by, tolerant=tolerant))
            return inserted

    def _simple(self, job: NewJob) -> tuple[single.Statement, tuple[Any, ...]]:
        """Return the insert of a simple job, and its parameters."""
        shape = job.shape
        kind = (job.name, shape, request_json(shape), job.priority, job.declared, job.queue, job.expected_ms)
        statement = self._own.get(kind) or self._count(kind)
        if statement is not None:
            return statement, (job.id, job.message)
        name, shape, request, *others = kind
        return _SIMPLE, (job.id, name, shape, request, job.message, *others)

    def _count(self, kind: _Kind) -> single.Statement | None:
        """Count a job of a kind without a statement; return the statement that the kind gets for that, if any."""
        if len(self._own) == _MAX_KINDS:
            return None
        came = self._came.pop(kind, 0) + 1
        if came == _COMMON:
            statement = self._own[kind] = _own_statement(kind)
            return statement
        if len(self._came) == _COUNTED:
            self._came.clear()
        self._came[kind] = came
        return None

    def _connect(self) -> PoolProxiedConnection:
        try:
            made = self._connection = self._engine.raw_connection()
        except psycopg2.Error as error:
            driver_error: Any = error
            lost = self._engine.dialect.is_disconnect(driver_error, None, None)
            raise DBAPIError.instance(None, None, error, psycopg2.Error, connection_invalidated=lost) from error
        return made

    def _give_up(self, error: BaseException | None) -> None:
        broken, self._connection = self._connection, None
        if broken is not None:
            broken.invalidate(error)

    def close(self) -> None:
        """Close the connection; the next job makes another."""
        with self._free:
            connected, self._connection = self._connection, None
            if connected is not None:
                connected.close()
