"""The tables in Postgres and their changes, by Alembic.

There is no `alembic.ini`. The configuration is built here, and the revisions are found by the path of this folder. So
the functions work from any working directory and from an installed wheel. An upgrade or downgrade is one transaction.
It holds an advisory lock until its commit, so that of two at once the second finds the work done.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from sqlalchemy import Connection, Engine, NullPool, create_engine, text
from sqlalchemy.exc import OperationalError

from celery_capacity.routing import format_versions
from celery_capacity.routing.database import deadlines, postgres_errors, server_checks
from celery_capacity.routing.errors import InvalidRequest, NotMigrated, StoreUnavailable, show

if TYPE_CHECKING:
    from alembic.config import Config

__all__ = ["HEAD", "MAX_COUNTED", "check", "count_jobs", "current", "downgrade", "upgrade"]

#: Newest revision. Kept as a constant so that `check` needs no import of Alembic; a test compares it.
HEAD: Final = "0029"

#: Revision that replaces all earlier ones, none of which is here any more.
FIRST: Final = "0011"

#: Table in which Alembic records the revision of a database.
VERSION_TABLE: Final = "alembic_version"

#: Seconds for a connection, and for one statement of a revision. A statement may rewrite a large table, and waits for
#: another upgrade of the same database.
CONNECT_TIMEOUT: Final = 10
MIGRATE_TIMEOUT: Final = 3600.0

#: Jobs up to which `count_jobs` counts: some 0.1 s of Postgres.
MAX_COUNTED: Final = 1_000_000

#: Key of the advisory lock under which revisions are applied: "migrate" in ASCII.
_LOCK: Final = int.from_bytes(b"migrate")

# Alembic's `context` and `op` belong to the whole process, so two threads must not run Alembic at once.
_IN_THIS_PROCESS: Final = threading.Lock()


def upgrade(database_url: str, revision: str = "head") -> None:
    """Apply the revisions up to `revision`. Do nothing if they are applied already."""
    from alembic import command

    _check_first(current(database_url))
    with _locked(database_url) as connection, _known_revision(revision):
        command.upgrade(_config(connection), revision)


def downgrade(database_url: str, revision: str) -> None:
    """Take back the revisions after `revision`.

    "base" takes back all of them, with every job. "-1" takes back the newest.
    """
    from alembic import command

    with _locked(database_url) as connection, _known_revision(revision):
        command.downgrade(_config(connection), revision)


def current(database: str | Engine) -> str | None:
    """Return the revision of the database, or None if no revision was ever applied.

    Raises StoreUnavailable when Postgres does not answer, and PlatformError when it is too old.
    """
    with _connected(database) as connection:
        if not _has_table(connection, VERSION_TABLE):
            return None
        revision = connection.execute(text(f"SELECT version_num FROM {VERSION_TABLE}")).scalar_one_or_none()
    return None if revision is None else str(revision)


def count_jobs(database: str | Engine) -> int:
    """Return the number of jobs in the tables, archived ones included: at most `MAX_COUNTED`."""
    with _connected(database) as connection:
        tables = [name for name in ("jobs", "jobs_archive") if _has_table(connection, name)]
        rows = " UNION ALL ".join(f"SELECT FROM {name}" for name in tables)
        if not rows:
            return 0
        statement = text(f"SELECT count(*) FROM (SELECT FROM ({rows}) AS jobs LIMIT :most) AS counted")
        return int(connection.execute(statement, {"most": MAX_COUNTED}).scalar_one())


def _has_table(connection: Connection, name: str) -> bool:
    return connection.execute(text("SELECT to_regclass(:name)"), {"name": name}).scalar_one() is not None


def check(database: str | Engine) -> str | None:
    """Raise NotMigrated unless the database has the tables that this version of the platform needs.

    Returns the revision if it is a newer one of the same format (`routing.format_versions`), which has these
    tables and more. Otherwise returns None.
    """
    revision = current(database)
    if revision is not None and revision > HEAD:
        if format_versions.of_revision(revision) == format_versions.of_revision(HEAD):
            return revision
        raise NotMigrated(
            f"Postgres is at revision {revision}, and this version of the platform knows {HEAD} as the newest",
            value=revision,
            advice="Install the version of the platform that upgraded it, or downgrade with that version.",
        )
    _check_first(revision)
    if revision != HEAD:
        raise NotMigrated(f"Postgres is at revision {revision or 'none'} and must be at {HEAD}", value=revision)
    return None


def _check_first(found: str | None) -> None:
    if found is not None and found < FIRST:
        raise NotMigrated(
            f"Postgres is at revision {found}, and this version of the platform begins with {FIRST}",
            value=found,
            advice=f"Upgrade it to {FIRST} with the version of the platform that made it, then with this one.",
        )


def _config(connection: Connection) -> Config:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


@contextmanager
def _known_revision(revision: str) -> Iterator[None]:
    """Turn Alembic's error for an unknown or unreachable revision into a platform error."""
    from alembic.util import CommandError

    try:
        yield
    except CommandError as error:
        advice = f'It must be an id up to {HEAD}, "head", "base", or steps such as -1.'
        raise InvalidRequest(f"revision {show(revision)}: {error}", value=revision, advice=advice) from error


@contextmanager
def _locked(database_url: str) -> Iterator[Connection]:
    """Open a transaction that alone changes the tables. The end of the block commits it."""
    with _IN_THIS_PROCESS, _connected(database_url) as connection, connection.begin():
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
        yield connection


def _own_engine(database_url: str) -> Engine:
    limits = {
        "connect_timeout": CONNECT_TIMEOUT,
        "connection_factory": deadlines.connection_factory(MIGRATE_TIMEOUT),
        "options": server_checks.PINNED,
    }
    return create_engine(database_url, poolclass=NullPool, connect_args=limits, hide_parameters=True)


@contextmanager
def _connected(database: str | Engine) -> Iterator[Connection]:
    engine = _own_engine(database) if isinstance(database, str) else database
    try:
        connection = engine.connect()
    except OperationalError as error:
        address = engine.url.render_as_string(hide_password=True)
        raise StoreUnavailable(f"Postgres at {address} does not answer: {postgres_errors.one_line(error)}") from error
    with connection:
        server_checks.check_version(connection)
        server_checks.check_database(connection)
        connection.rollback()
        yield connection
