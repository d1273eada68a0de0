"""Exactly-once effects: a task's own rows commit in the transaction that ends its job.

    with fenced(session):
        session.add(Invoice(...))

Leaving the block commits the rows and the end of the job together, or neither. An attempt that lost its lease is rolled
back and told so. Whatever dies, and however often the body starts, the rows are there once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from celery import current_app
from sqlalchemy import Connection
from sqlalchemy.orm import Session

from celery_capacity.routing.errors import InvalidRequest, LeaseLost, PlatformError
from celery_capacity.routing.model.reasons import Refusal
from celery_capacity.routing.store import fencing
from celery_capacity.workers.process import attempts
from celery_capacity.workers.process.attempts import Attempt
from celery_capacity.workers.process.stores import stores_of


@contextmanager
def fenced(session: Session) -> Iterator[Session]:
    """Commit the block's changes through `session` together with the end of the job that runs here.

    `session`: a SQLAlchemy Session on the platform's database, not in autocommit mode. From the commit on the job has
    succeeded, whatever the body does after the block. An exception in the block rolls back and goes on.

    Raises `LeaseLost` where this attempt may no longer end the job; all changes are rolled back. Raises
    `InvalidRequest` for a session that cannot be used, before anything is written. Raises `PlatformError` outside of a
    running attempt.
    """
    attempt = attempts.current()
    if attempt is None:
        raise PlatformError(
            "fenced() is used outside of a running attempt",
            advice="Use it in the body of a task that a worker of the platform runs, in the thread of the body.",
        )
    _check(session, attempt)
    try:
        yield session
        session.flush()
        _end(session, attempt)
        session.commit()
        attempt.outbox.committed = True
    except BaseException:
        session.rollback()
        raise


def _check(session: Session, attempt: Attempt) -> None:
    if not isinstance(session, Session):
        raise InvalidRequest(
            f"fenced() takes a SQLAlchemy Session, not a {type(session).__name__}",
            value=type(session).__name__,
            advice="Pass sqlalchemy.orm.Session(engine); an AsyncSession does not do.",
        )
    if session.get_bind().dialect.name != "postgresql":
        raise _elsewhere(session.get_bind().dialect.name)
    connection = session.connection()
    if _commits_by_itself(connection):
        raise InvalidRequest(
            "fenced() cannot use a session in autocommit mode: each of its statements would stand by itself",
            value="AUTOCOMMIT",
            advice="Make the session of an engine with the usual isolation level.",
        )
    if not fencing.is_registered(connection, attempt.incarnation):
        raise _elsewhere(str(connection.engine.url.database))


def _commits_by_itself(connection: Connection) -> bool:
    return bool(getattr(connection.connection.driver_connection, "autocommit", False))


def _elsewhere(where: str) -> InvalidRequest:
    return InvalidRequest(
        f"fenced() takes a session on the platform's own database, and this one is on another ({where})",
        value=where,
        advice="Keep the rows of the effect in the database of DATABASE_URL: only there can both commit together.",
    )


def _end(session: Session, attempt: Attempt) -> None:
    connection = session.connection()
    stores = stores_of(current_app)
    hangs_after = fencing.HANGS_AFTER if stores is None else stores.settings.lost_after
    if fencing.commit(connection, attempt.publisher, hangs_after):
        return
    why, itself = fencing.why_not(connection, attempt.publisher)
    where = f"attempt {attempt.tag.token.attempt} of job {attempt.tag.job}"
    if itself:
        raise PlatformError(
            f"{where} cannot end its job once more: {why}", advice="Leave one fenced() block in an attempt."
        )
    if stores is not None:
        stores.sending.ask(lambda ledger: ledger.count(Refusal.STALE_COMMIT))
    raise LeaseLost(f"{where} lost its lease: {why}; what it changed is rolled back")
