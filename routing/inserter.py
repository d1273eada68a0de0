"""The shortest way of one job into Postgres: of one that nothing holds back and no attempt publishes, as most are.

To submit is to wait for Postgres's log; all else is to be little. So a process keeps one connection for this, rather
than check one out of the pool each time, and a job that says nothing unusual is inserted by a statement that names only
what it says: each parameter of a prepared statement is parsed, planned and evaluated anew.
"""

from __future__ import annotations

import threading
from typing import Any, Final

import psycopg2
from sqlalchemy import Engine, PoolProxiedConnection
from sqlalchemy.exc import DBAPIError

from routing import accept
from routing.accept import Inserted, NewJob
from routing.states import State

_SIMPLE: Final = accept.Statement.of(
    "celery_capacity_insert_simple_job",
    "id, name, state, shape, request, message, priority, declared, queue, root_id",
    "text, text, text, jsonb, bytea, smallint, bool, text",
    f"VALUES ($1, $2, '{State.ACCEPTED.value}', $3, $4, $5, $6, $7, $8, $1)",
    8,
)


def _is_simple(job: NewJob) -> bool:
    """Whether a job leaves all other columns as they are by default."""
    return (
        job.root_id == job.id
        and job.rerun
        and not (job.retries or job.nesting or job.parent_id or job.replaces or job.stamps)
        and job.due_at is None
        and job.expires_at is None
    )


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

    def doubt(self) -> None:
        """Another connection broke: the one that is kept may have, too, and is made anew. Waits for nobody."""
        self._doubted = True

    def insert(self, job: NewJob) -> Inserted | None:
        """Make a job durable, as `accept.insert_job`; None where nothing was inserted. Raises `NotMigrated`, and
        SQLAlchemy's `DBAPIError`."""
        if not self._free.acquire(blocking=False):
            with self._others.connect() as connection:
                inserted = accept.insert_job(connection, job)
            return None if inserted.seq is None else inserted
        try:
            if self._doubted:
                self._doubted = False
                self._give_up(None)
            connected = self._connection or self._connect()
            if _is_simple(job):
                values: tuple[Any, ...] = (
                    job.id,
                    job.name,
                    job.shape,
                    accept.request_json(job.shape),
                    job.message,
                    job.priority,
                    job.declared,
                    job.queue,
                )
                row = accept.execute_insert(connected, self._give_up, _SIMPLE, values)
            else:
                row = accept.execute_insert(connected, self._give_up, accept.BY_ANYBODY, accept.values_of(job))
        finally:
            self._free.release()
        return None if row is None else accept.inserted_by(row, job)

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
