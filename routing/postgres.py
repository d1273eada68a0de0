"""What Postgres's errors mean for the platform."""

from __future__ import annotations

from typing import Final

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from routing.errors import NotMigrated, PlatformError, StoreUnavailable

#: The oldest Postgres that is tested, and has all that the statements use.
OLDEST: Final = 13
#: SQLSTATE of a table that does not exist, and of a column.
NOT_THERE: Final = ("42P01", "42703")
#: SQLSTATE of what the role may not do.
NOT_ALLOWED: Final = "42501"
#: SQLSTATE of a lock that was waited for in vain.
LOCKED: Final = "55P03"


def told(error: DBAPIError) -> str:
    """What the driver said, in one line: it may have written several, and an empty one at their end."""
    return " ".join(str(error.orig).split())


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


def is_locked(error: BaseException | None) -> bool:
    """Whether it came of a row or a table that somebody else keeps locked: Postgres answers, and all else goes on."""
    while error is not None:
        if getattr(getattr(error, "orig", None), "pgcode", None) == LOCKED:
            return True
        error = error.__cause__
    return False
