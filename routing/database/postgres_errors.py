"""Errors of Postgres and of its driver, and their meaning for the platform."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import psycopg2
from sqlalchemy import Engine, event
from sqlalchemy.dialects.postgresql.psycopg2 import PGDialect_psycopg2
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from celery_capacity.routing.errors import NotMigrated, PlatformError, StoreUnavailable

#: SQLSTATE of a missing table, and of a missing column.
NOT_THERE: Final = ("42P01", "42703")
#: SQLSTATE of a statement that the role may not execute.
NOT_ALLOWED: Final = "42501"
#: SQLSTATE of a write to a read-only server: a standby, or a server that was made read-only for a while.
READ_ONLY: Final = "25006"
#: SQLSTATE of a lock that was not obtained in time.
LOCKED: Final = "55P03"

_DIALECT: Final[Any] = PGDialect_psycopg2(dbapi=psycopg2)  # type: ignore[no-untyped-call]


def is_lost(error: psycopg2.Error, connection: Any) -> bool:
    """Return whether an error means that the driver's connection is lost.

    The statement that it was executing may or may not be done. After the server was killed, libpq does not always
    report the connection as closed.
    """
    return bool(getattr(connection, "closed", 0)) or bool(_DIALECT.is_disconnect(error, None, None))


def of_driver(
    error: psycopg2.Error, statement: str, driver: Any, invalidate: Callable[[BaseException], None]
) -> BaseException:
    """Return an error of the driver's own cursor as SQLAlchemy's, and give up a broken connection as it would do."""
    if error.pgcode in NOT_THERE:
        return NotMigrated()
    broken = is_lost(error, driver)
    if broken:
        invalidate(error)
    return DBAPIError.instance(
        statement, None, error, psycopg2.Error, hide_parameters=True, connection_invalidated=broken
    )


def one_line(error: DBAPIError) -> str:
    """Return the message of the driver in one line, as sentences. The driver may write several lines."""
    lines = [" ".join(line.split()) for line in str(error.orig).splitlines() if line.strip()]
    ended = [line if line.endswith((".", "!", "?", ":", ";", ",")) else f"{line}." for line in lines[:-1]]
    return " ".join([*ended, *lines[-1:]])


def hide_values(engine: Engine) -> None:
    """Make the errors of an engine report the fault without the values.

    Postgres's DETAIL names the row, which has arguments and results of jobs. The engine itself is made with
    `hide_parameters`.
    """
    event.listen(engine, "handle_error", _without_detail)


def _without_detail(context: ExceptionContext) -> None:
    original, shown = context.original_exception, context.sqlalchemy_exception
    message = getattr(getattr(original, "diag", None), "message_primary", None)
    if message and shown is not None:
        original.args = (message,)
        shown.args = (f"({type(original).__module__}.{type(original).__name__}) {message}",)


def translate(error: DBAPIError | PoolTimeout, also: str = "") -> PlatformError:
    """Return an error of the driver as an error of the platform. `also` precedes the message of Postgres."""
    if isinstance(error, PoolTimeout):
        return StoreUnavailable(f"{also}no connection to Postgres was free")
    if getattr(error.orig, "pgcode", None) in NOT_THERE:
        return NotMigrated()
    if getattr(error.orig, "pgcode", None) == NOT_ALLOWED:
        return PlatformError(
            f"{also}Postgres does not allow it: {one_line(error)}",
            advice="Use a role that may (deploy/postgres-roles.sql).",
        )
    return StoreUnavailable(f"{also}Postgres does not answer: {one_line(error)}")


@contextmanager
def translated(also: str = "") -> Iterator[None]:
    """Raise the errors of the driver within the block as errors of the platform, see `translate`."""
    try:
        yield
    except (DBAPIError, PoolTimeout) as error:
        raise translate(error, also) from error


def is_locked(error: BaseException | None) -> bool:
    """Return whether an error comes from a row or a table that another transaction keeps locked.

    Postgres answers then, and all other work goes on.
    """
    while error is not None:
        if getattr(getattr(error, "orig", None), "pgcode", None) == LOCKED:
            return True
        error = error.__cause__
    return False
