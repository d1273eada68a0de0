"""The shortest way of one job into Postgres: of one that nothing holds back and no attempt publishes, as most are.

To submit is to wait for Postgres's log; all else is to be little. So a process keeps one connection for this, rather
than check one out of the pool each time, and a job that says nothing unusual is inserted by a statement that names only
what it says: each parameter of a prepared statement is parsed, planned and evaluated anew. What jobs that come time and
again have in common stands in a statement of theirs.
"""

from __future__ import annotations

import threading
from typing import Any, Final

import psycopg2
from sqlalchemy import Engine, PoolProxiedConnection
from sqlalchemy.exc import DBAPIError

from celery_capacity.routing.insert import single
from celery_capacity.routing.model.job import Inserted, NewJob
from celery_capacity.routing.model.states import State

_COLUMNS: Final = "id, name, state, shape, request, message, priority, declared, queue, root_id"
#: Of any such job.
_SIMPLE: Final = single.Statement.of(
    "celery_capacity_insert_simple_job",
    _COLUMNS,
    "text, text, text, jsonb, bytea, smallint, bool, text",
    f"VALUES ($1, $2, '{State.ACCEPTED.value}', $3, $4, $5, $6, $7, $8, $1)",
    8,
)
#: Jobs after which a kind of them is common, and has a statement of its own, of two parameters; the kinds that are
#: counted, and that may have one (it costs the server some ten kB).
_COMMON: Final = 8
_COUNTED: Final = 256
_MOST_KINDS: Final = 32

#: What jobs of one kind have in common, as `_SIMPLE` has it: name, shape, request, priority, declared, queue.
_Kind = tuple[str, str, str, int, bool, str]


def _is_simple(job: NewJob) -> bool:
    """Whether a job leaves all other columns as they are by default."""
    return (
        job.root_id == job.id
        and job.rerun
        and not (job.retries or job.nesting or job.parent_id or job.replaces or job.stamps)
        and job.due_at is None
        and job.expires_at is None
    )


def _general(job: NewJob) -> tuple[single.Statement, tuple[Any, ...]]:
    return single.BY_ANYBODY, single.values_of(job)


def _own_statement(kind: _Kind) -> single.Statement:
    """The insert of jobs of one kind: all that they have in common stands in it."""
    source = f"VALUES ($1, %s, '{State.ACCEPTED.value}', %s, %s, $2, %s, %s, %s, $1)"
    return single.Statement.of("celery_capacity_insert_own_job", _COLUMNS, "text, bytea", source, 2, common=kind)


class Inserter:
    """Inserts jobs by a connection of its own, which `engine` makes (it keeps none); a second thread that comes
    meanwhile takes one of `others`. Thread-safe; not carried over a fork."""

    def __init__(self, engine: Engine, others: Engine) -> None:
        self._engine = engine
        self._others = others
        self._free = threading.Lock()
        self._connection: PoolProxiedConnection | None = None
        #: Whether it is to be made anew before it is used.
        self._doubted = False
        #: How often jobs of a kind came, and the statements of those that are common.
        self._came: dict[_Kind, int] = {}
        self._own: dict[_Kind, single.Statement] = {}

    def doubt(self) -> None:
        """Another connection broke: the one that is kept may have, too, and is made anew. Waits for nobody."""
        self._doubted = True

    def insert(self, job: NewJob) -> Inserted | None:
        """Make a job durable, as `accept.insert_job`; None where nothing was inserted. Raises `NotMigrated`, and
        SQLAlchemy's `DBAPIError`."""
        if not self._free.acquire(blocking=False):
            with self._others.connect() as connection:
                inserted = single.insert_job(connection, job)
            return None if inserted.seq is None else inserted
        try:
            if self._doubted:
                self._doubted = False
                self._give_up(None)
            connected = self._connection or self._connect()
            statement, values = self._simple(job) if _is_simple(job) else _general(job)
            row = single.execute_insert(connected, self._give_up, statement, values)
        finally:
            self._free.release()
        return None if row is None else single.inserted_by(row, job)

    def _simple(self, job: NewJob) -> tuple[single.Statement, tuple[Any, ...]]:
        """The insert of a simple job, and its parameters."""
        shape = job.shape
        kind = (job.name, shape, single.request_json(shape), job.priority, job.declared, job.queue)
        own = self._own.get(kind) or self._count(kind)
        if own is not None:
            return own, (job.id, job.message)
        name, shape, request, *others = kind
        return _SIMPLE, (job.id, name, shape, request, job.message, *others)

    def _count(self, kind: _Kind) -> single.Statement | None:
        """Another one of a kind that has no statement of its own; the one that it gets for that."""
        if len(self._own) == _MOST_KINDS:
            return None
        came = self._came.pop(kind, 0) + 1
        if came == _COMMON:
            own = self._own[kind] = _own_statement(kind)
            return own
        if len(self._came) == _COUNTED:
            self._came.clear()
        self._came[kind] = came
        return None

    def _connect(self) -> PoolProxiedConnection:
        try:
            made = self._connection = self._engine.raw_connection()
        except psycopg2.Error as error:
            given: Any = error
            lost = self._engine.dialect.is_disconnect(given, None, None)
            raise DBAPIError.instance(None, None, error, psycopg2.Error, connection_invalidated=lost) from error
        return made

    def _give_up(self, error: BaseException | None) -> None:
        broken, self._connection = self._connection, None
        if broken is not None:
            broken.invalidate(error)

    def close(self) -> None:
        """End the connection; the next job makes another."""
        with self._free:
            connected, self._connection = self._connection, None
            if connected is not None:
                connected.close()
