"""Finished jobs leave the tables that every submit and every duty reads, for an archive.

One call moves some of them, with their attempts, in one statement (`archive_finished`, see migration 0003). What has
not ended never moves, nor does what somebody still needs: a job whose worker has not spoken yet, whose result is not
delivered, or of which an attempt is open. The archive has no messages: nothing runs an archived job again, and its
arguments need not be kept for as long as the fact that it ran.

From then on the id is free: a publish under it is a new job, as where there never was one. An attempt that is still
under way somewhere cannot speak for it: what is not in `jobs` publishes nothing (`routing.insert.single`).
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import Connection, text

#: Jobs moved in one statement: some 30 ms of Postgres, in which nobody waits for anything.
CHUNK: Final = 1000

_MOVE: Final = text("SELECT archive_finished(:keep, :most)")


def archive_finished(connection: Connection, keep: float, most: int) -> int:
    """Move at most so many jobs that ended more than `keep` seconds ago, the oldest first; returns how many."""
    return int(connection.execute(_MOVE, {"keep": keep, "most": most}).scalar_one())
