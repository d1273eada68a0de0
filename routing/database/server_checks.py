"""Checks of a Postgres server: its version, the encoding of its database, and the isolation of its connections."""

from __future__ import annotations

from typing import Final

from sqlalchemy import Connection, text

from celery_capacity.routing.errors import PlatformError, Unsupported

#: The oldest Postgres that is tested, and that has all features of the statements.
OLDEST: Final = 13
#: The encoding of a database that can store every error and name.
ENCODING: Final = "UTF8"
#: The isolation that the statements are written for. Each statement sees all that was committed before it began, and
#: waits for a locked row instead of failing.
ISOLATION: Final = "read committed"
#: Options of each connection, so that no default of the server, the database or the role counts. In libpq's `options` a
#: space is escaped.
PINNED: Final = "-c default_transaction_isolation=read\\ committed"


def check_version(connection: Connection) -> None:
    """Raise `PlatformError` where the server is older than the platform's statements need."""
    version = connection.dialect.server_version_info or (OLDEST,)
    if int(version[0]) < OLDEST:
        release = ".".join(map(str, version))
        where = connection.engine.url.render_as_string(hide_password=True)
        raise PlatformError(
            f"Postgres at {where} is version {release}, and the platform needs {OLDEST}",
            value=release,
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
