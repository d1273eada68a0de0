"""Transactional enqueue: `apply_async(session=...)`. The job's row is part of the caller's own transaction.

Nobody sees the job until the commit. A rollback, also of a savepoint, takes it back. After the commit of a Session this
process brings the job to the ledger. SQLAlchemy does not report the commit of a bare Connection, and a process may die
right after a commit. Then a worker brings the job in, because a notification goes with the rows
(`workers.runner.commit_listener`). Where both fail, the sweep brings it in.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Final

from sqlalchemy import Connection, event
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.orm import Session, scoped_session

from celery_capacity.routing.database import deadlines
from celery_capacity.routing.errors import (
    InvalidRequest,
    NotAccepted,
    NotMigrated,
    PlatformError,
    Unsupported,
    mask_url,
    show,
)
from celery_capacity.routing.insert import bulk, caller_session, single
from celery_capacity.routing.insert.caller_session import JobsTable
from celery_capacity.routing.model.job import NewJob, Publisher
from celery_capacity.workers.process import attempts
from celery_capacity.workers.process.stores import Stores
from celery_capacity.workers.submit.chunk_writer import to_ledger
from celery_capacity.workers.submit.sender import Sender

logger = logging.getLogger(__name__)

#: Jobs of one transaction that this process brings to the ledger itself. Workers bring in the jobs beyond.
MAX_KEPT: Final = 1000
#: Key in a connection's `info` for the platform's table, once the connection is known to lead to it.
_KNOWN: Final = "celery_capacity_home"
_ADVICE: Final = "Pass a Session or a Connection of SQLAlchemy on the database of DATABASE_URL."


class SessionJobs:
    """Sender of jobs into the transaction of a `session`: a Session, a scoped session or a Connection."""

    def __init__(self, sender: Sender, stores: Stores, session: Any) -> None:
        self._sender = sender
        self._stores = stores
        self._session = _checked(session)

    def accept(self, body: Any, **message: Any) -> NewJob:
        """Accept a message like `Sender.accept`, up to the commit: the caller makes that."""
        job = self._sender.encode(body, **message)
        self.add([job])
        return job

    def check(self) -> None:
        """Raise `InvalidRequest` for a session on another database."""
        self._table(self._connection())

    def add(self, jobs: Sequence[NewJob]) -> None:
        """Write the rows of jobs.

        Raises `InvalidRequest` for a session on another database, `Unsupported`, `NotAccepted`.
        """
        for job in jobs:
            if job.constraints is not None:
                # Its constraints lock out other submitters until a commit, and nobody knows when that comes.
                raise Unsupported(
                    f"job {job.id} ({job.name}) is held back by unique, after or a rate limit, and cannot be part of"
                    " the caller's transaction",
                    value=job.name,
                    advice="Submit it after the commit, or without these.",
                )
        connection = self._connection()
        table = self._table(connection)
        attempt = attempts.current()
        if attempt is not None:
            self._check_lease(attempt.publisher, jobs[0])
        try:
            with deadlines.watched(connection, self._stores.settings.store_timeout):
                written = caller_session.insert_jobs(connection, table, jobs)
        except DBAPIError as error:
            raise NotAccepted(
                f"Postgres refused job {jobs[0].id} in the caller's transaction: {mask_url(str(error.orig))}",
                advice="The transaction has failed: roll it back. Its role needs the rights of platform_submitter.",
            ) from error
        if isinstance(self._session, Session):
            _remember(self._session, self._sender, self._stores, [job for job in jobs if job.id in written])

    def _check_lease(self, publisher: Publisher, job: NewJob) -> None:
        try:
            with self._stores.engine.connect() as connection:
                if not single.may_publish(connection, publisher):
                    self._sender.refuse(single.confirmed(connection), job, publisher)
        except SQLAlchemyError as error:
            raise NotAccepted(f"Postgres does not answer: job {job.id} was not written") from error

    def _connection(self) -> Connection:
        if isinstance(self._session, Connection):
            return self._session
        try:
            return self._session.connection()
        except SQLAlchemyError as error:
            raise InvalidRequest(
                f"the session does not say which database it is on: {error}",
                value=type(self._session).__name__,
                advice="Pass the connection: session=session.connection(bind_arguments=...).",
            ) from error

    def _table(self, connection: Connection) -> JobsTable:
        """Return the platform's table, and raise `InvalidRequest` where this connection does not lead to it.

        The table is kept with a connection that led there, so that each connection to the server is checked once.
        """
        if connection.dialect.name != "postgresql":
            raise _elsewhere(connection.dialect.name)
        cached: JobsTable | None = connection.info.get(_KNOWN)
        if cached is not None and cached == _tables.get(self._stores):
            return cached
        for again in (False, True):
            table = _jobs_table_of(self._stores, again)
            try:
                with deadlines.watched(connection, self._stores.settings.store_timeout):
                    is_same = caller_session.is_same_table(connection, table)
            except DBAPIError as error:
                raise NotAccepted(
                    f"Postgres refused the caller's transaction: {mask_url(str(error.orig))}",
                    advice="The transaction has failed: roll it back.",
                ) from error
            if is_same:
                connection.info[_KNOWN] = table
                return table
        raise _elsewhere(str(connection.engine.url.database))


def _checked(session: Any) -> Session | Connection:
    if isinstance(session, scoped_session):
        session = session()
    if isinstance(session, (Session, Connection)):
        return session
    if type(session).__name__.startswith(("Async", "async_")):
        raise InvalidRequest(
            f"session {type(session).__name__} is not valid: sending a job waits for Postgres",
            value=type(session).__name__,
            advice="Write `await session.run_sync(lambda sync: task.apply_async(args, session=sync))`.",
        )
    raise InvalidRequest(f"session {show(session)} is not valid", value=session, advice=_ADVICE)


def _elsewhere(where: str) -> InvalidRequest:
    return InvalidRequest(
        f"the session is on another database ({where}) than the platform's jobs", value=where, advice=_ADVICE
    )


_tables: weakref.WeakKeyDictionary[Stores, JobsTable] = weakref.WeakKeyDictionary()


def _jobs_table_of(stores: Stores, again: bool) -> JobsTable:
    """Return the platform's own table, looked up once.

    `again`: look it up anew, because a connection does not lead there. The server may have been started anew.
    """
    table = None if again else _tables.get(stores)
    if table is None:
        try:
            with stores.engine.connect() as connection:
                table = caller_session.jobs_table(connection)
        except SQLAlchemyError as error:
            raise NotAccepted("Postgres does not answer: the job was not written") from error
        if table is None:
            raise NotMigrated()
        _tables[stores] = table
    return table


# -- after the commit of a Session

_Kept = tuple[Sender, list[NewJob]]
#: Jobs that the transaction of each session has added, by the stores of their app.
_kept: weakref.WeakKeyDictionary[Session, dict[Stores, _Kept]] = weakref.WeakKeyDictionary()


def _remember(session: Session, sender: Sender, stores: Stores, jobs: Sequence[NewJob]) -> None:
    if not event.contains(session, "after_commit", _after_commit):
        event.listen(session, "after_commit", _after_commit)
        event.listen(session, "after_transaction_end", _after_end)
    _, kept = _kept.setdefault(session, {}).setdefault(stores, (sender, []))
    kept.extend(jobs[: max(0, MAX_KEPT - len(kept))])


def _after_commit(session: Session) -> None:
    # SQLAlchemy also calls this when a savepoint is released. The savepoint's jobs may still be rolled back.
    if session.in_nested_transaction():
        return
    for stores, (sender, jobs) in _kept.pop(session, {}).items():
        _bring_in(sender, stores, [job for job in jobs if job.starts])


def _after_end(session: Session, transaction: Any) -> None:
    if transaction.parent is None:
        _kept.pop(session, None)


def _bring_in(sender: Sender, stores: Stores, jobs: Sequence[NewJob]) -> None:
    """Admit or file committed jobs. Never raises.

    Postgres says which jobs are committed. Savepoints may have been rolled back, or the session's transaction may be
    part of another one. After an error the rows are there, and a worker or the sweep brings them in.
    """
    if not jobs:
        return
    began_ms = time.time() * 1000
    try:
        with stores.engine.connect() as connection:
            committed = bulk.committed(connection, jobs)
        there: Mapping[str, int] = committed.seqs
        to_ledger(sender, [job for job in jobs if job.id in there], committed, began_ms)
    except (SQLAlchemyError, PlatformError) as error:
        logger.warning("%d jobs were committed, and a worker brings them in: %s", len(jobs), error)
