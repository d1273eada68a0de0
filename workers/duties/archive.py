"""Move jobs that ended long ago into the archive."""

from __future__ import annotations

from typing import Final

from celery import Celery

from celery_capacity.routing.store import archive, chord_counts
from celery_capacity.workers.process.stores import Stores

#: Most statements of one pass. At the usual sweep interval they move 1,000 jobs a second, more than a platform ends.
MAX_STATEMENTS: Final = 10
#: Seconds for which Postgres counts a chord: as long as Celery keeps a result by default.
CHORDS_KEPT: Final = 86400.0


def run_once(app: Celery, stores: Stores) -> dict[str, int]:
    """Archive finished jobs, and forget chords that were never completed.

    Counts: `archived` jobs; `chords`: rows of such chords.
    """
    archived, keep = 0, stores.settings.keep_finished
    for _ in range(MAX_STATEMENTS if keep else 0):
        with stores.engine.connect() as connection:
            moved = archive.archive_finished(connection, keep, archive.CHUNK)
        archived += moved
        if moved < archive.CHUNK:
            break
    with stores.engine.connect() as connection:
        forgotten = chord_counts.forget_old(connection, CHORDS_KEPT)
    return {"archived": archived, "chords": forgotten}
