"""Move finished jobs out of the tables that every submit and every duty reads, into an archive.

One call moves some jobs with their attempts, in one statement (`archive_finished`, see migration 0014). A job that has
not ended never moves. An ended job stays while somebody needs it: its worker has not reported yet, its result is not
delivered, or one of its attempts is open. The archive has no messages: nothing runs an archived job again, and its
arguments need not be kept for as long as the fact that it ran.

An archived id is free: a publish under it makes a new job, as if the id had never been used. An attempt of the archived
job that still runs somewhere cannot speak for the new one: a job that is not in `jobs` publishes nothing
(`routing.insert.single`).

The archive is partitioned by the month in which jobs come there, and whole months are dropped. The statement that moves
jobs makes the month that it needs, so that a missing one stops nothing. The duty makes the next month a week before.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import Connection, text

#: Jobs moved in one statement. It takes Postgres some 30 ms, in which nobody waits for anything.
CHUNK: Final = 1000

_MOVE: Final = text("SELECT archive_finished(:keep, :most)")
_OPEN: Final = text("SELECT open_archive(true)")
_DROP: Final = text("SELECT drop_archived(:keep)")


def archive_finished(connection: Connection, keep: float, most: int) -> int:
    """Archive at most `most` jobs that ended more than `keep` seconds ago, oldest first; return how many."""
    return int(connection.execute(_MOVE, {"keep": keep, "most": most}).scalar_one())


def open_next_month(connection: Connection) -> None:
    """Make the partitions of the month in a week, where they are missing."""
    connection.execute(_OPEN)


def drop_oldest_month(connection: Connection, keep: float) -> str | None:
    """Drop the oldest month, if all of its jobs came into the archive more than `keep` seconds ago.

    Returns its name, such as 2026_12, or None where it is kept. Raises `DBAPIError` where the role may not drop it, or
    a reader of the archive was not done within a second.
    """
    dropped: str | None = connection.execute(_DROP, {"keep": keep}).scalar_one()
    return dropped
