"""Jobs that ended long ago go into the archive."""

from __future__ import annotations

from typing import Final

from celery import Celery

from celery_capacity.routing.store import archive, chord_counts
from celery_capacity.workers.process.stores import Stores

#: Statements of one pass: at the usual sweep interval 1,000 jobs a second, more than a platform ends.
MOST: Final = 10
#: Seconds for which a chord is counted in Postgres: as long as Celery keeps a result, unless it is told otherwise.
CHORDS_KEPT: Final = 86400.0


def run_once(app: Celery, stores: Stores) -> dict[str, int]:
    """Counts: `archived` jobs; `chords`: rows of chords that were never completed."""
    archived, keep = 0, stores.settings.keep_finished
    for _ in range(MOST if keep else 0):
        with stores.engine.connect() as connection:
            moved = archive.archive_finished(connection, keep, archive.CHUNK)
        archived += moved
        if moved < archive.CHUNK:
            break
    with stores.engine.connect() as connection:
        forgotten = chord_counts.forget_old(connection, CHORDS_KEPT)
    return {"archived": archived, "chords": forgotten}
