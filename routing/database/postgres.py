"""What Postgres's errors mean for the platform."""

from __future__ import annotations

from typing import Any, Final

import psycopg2
from sqlalchemy import Connection, Engine, event, text
from sqlalchemy.dialects.postgresql.psycopg2 import PGDialect_psycopg2
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import DBAPIError

from celery_capacity.routing.errors import NotMigrated, PlatformError, StoreUnavailable, Unsupported

#: The oldest Postgres that is tested, and has all that the statements use.
OLDEST: Final = 13
#: The encoding of a database that can store every error and name.
ENCODING: Final = "UTF8"
#: The isolation that the statements are written for: each sees what others committed before it began, and waits for a
#: locked row instead of failing.
ISOLATION: Final = "read committed"
#: Options of each connection that do not depend on what the server, the database or the role has as its default. (In
#: libpq's `options` a space is escaped.)
PINNED: Final = "-c default_transaction_isolation=read\\ committed"
#: SQLSTATE of a table that does not exist, and of a column.
NOT_THERE: Final = ("42P01", "42703")
#: SQLSTATE of what the role may not do.
NOT_ALLOWED: Final = "42501"
#: SQLSTATE of a write to a server that only reads: a standby, or one that was made so for a while.
READ_ONLY: Final = "25006"
#: SQLSTATE of a lock that was waited for in vain.
LOCKED: Final = "55P03"

_DIALECT: Final[Any] = PGDialect_psycopg2(dbapi=psycopg2)  # type: ignore[no-untyped-call]


def is_lost(error: psycopg2.Error, connection: Any) -> bool:
    """Whether an error of the driver's connection means that it is of no more use: what it was in the middle of may or
    may not be done. (Over a socket of a server that was killed libpq does not always say that it is closed.)"""
    return bool(getattr(connection, "closed", 0)) or bool(_DIALECT.is_disconnect(error, None, None))


def told(error: DBAPIError) -> str:
    """What the driver said, in one line: it may have written several, and an empty one at their end."""
    return " ".join(str(error.orig).split())


def hide_values(engine: Engine) -> None:
    """Have the errors of an engine say what is wrong and not with which values: Postgres's DETAIL names the row, which
    has arguments and results of jobs. (The engine itself is made with `hide_parameters`.)"""
    event.listen(engine, "handle_error", _without_detail)


def _without_detail(context: ExceptionContext) -> None:
    original, shown = context.original_exception, context.sqlalchemy_exception
    said = getattr(getattr(original, "diag", None), "message_primary", None)
    if said and shown is not None:
        original.args = (said,)
        shown.args = (f"({type(original).__module__}.{type(original).__name__}) {said}",)


def translate(error: DBAPIError, also: str = "") -> PlatformError:
    """An error of the driver as one of the platform; `also` goes in front of what Postgres said."""
    if getattr(error.orig, "pgcode", None) in NOT_THERE:
        return NotMigrated()
    if getattr(error.orig, "pgcode", None) == NOT_ALLOWED:
        return PlatformError(
            f"{also}Postgres does not allow it: {told(error)}",
            advice="Use a role that may (deploy/postgres-roles.sql).",
        )
    return StoreUnavailable(f"{also}Postgres does not answer: {told(error)}")


def check_version(connection: Connection) -> None:
    """Raise where the server is older than the platform's statements need."""
    version = connection.dialect.server_version_info or (OLDEST,)
    if int(version[0]) < OLDEST:
        found = ".".join(map(str, version))
        where = connection.engine.url.render_as_string(hide_password=True)
        raise PlatformError(
            f"Postgres at {where} is version {found}, and the platform needs {OLDEST}",
            value=found,
            advice=f"Use Postgres {OLDEST} or newer.",
        )


def check_database(connection: Connection) -> None:
    """Raise `Unsupported` where the database cannot store all text, or the connection has another isolation."""
    encoding, isolation = connection.execute(
        text("SELECT current_setting('server_encoding'), current_setting('default_transaction_isolation')")
    ).one()
    where = connection.engine.url.render_as_string(hide_password=True)
    if encoding != ENCODING:
        raise Unsupported(
            f"the database {where} has the encoding {encoding}, which cannot store every error and name",
            value=encoding,
            advice=f"Make one with CREATE DATABASE ... ENCODING '{ENCODING}' TEMPLATE template0, and name it in "
            "DATABASE_URL.",
        )
    if isolation != ISOLATION:
        raise Unsupported(
            f"connections to {where} have the isolation {isolation}, and a pooler or DATABASE_URL keeps it so",
            value=isolation,
            advice=f"Let `options` of the connection pass, or ALTER DATABASE ... SET default_transaction_isolation = "
            f"'{ISOLATION}'.",
        )


def is_locked(error: BaseException | None) -> bool:
    """Whether it came of a row or a table that somebody else keeps locked: Postgres answers, and all else goes on."""
    while error is not None:
        if getattr(getattr(error, "orig", None), "pgcode", None) == LOCKED:
            return True
        error = error.__cause__
    return False
