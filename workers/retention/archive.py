"""Move jobs that ended long ago into the archive, and drop what the archive need not keep."""

from __future__ import annotations

import time
from typing import Final

from celery import Celery

from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.store import archive, chord_counts
from celery_capacity.workers.process.stores import Stores

#: Share of the time between two passes for which a pass goes on while there are jobs. A job takes some 20 to 50 us:
#: that is 2,000 to 5,000 jobs a second in all, more than one ledger ends. The other duties wait for a second at the
#: most.
MAX_SHARE: Final = 0.1
#: Most seconds between two passes, which bounds a pass too.
MAX_PAUSE: Final = 10.0
#: Seconds for which Postgres counts a chord: as long as Celery keeps a result by default.
CHORDS_KEPT: Final = 86400.0


def pause(settings: Settings) -> float:
    """Return the seconds between two passes: the sweep interval, unless that is long."""
    return min(settings.sweep_interval, MAX_PAUSE)


def run_once(app: Celery, stores: Stores) -> dict[str, int]:
    """Archive finished jobs, forget chords that were never completed, and drop a month of the archive.

    The drop comes last: where it fails, the rest is done. Counts: `archived` jobs; `chords`: rows of such chords;
    `months` of the archive.
    """
    archived, keep, keep_archived = 0, stores.settings.keep_finished, stores.settings.keep_archived
    until = time.monotonic() + MAX_SHARE * pause(stores.settings)
    while keep:
        with stores.engine.connect() as connection:
            moved = archive.archive_finished(connection, keep, archive.CHUNK)
        archived += moved
        if moved < archive.CHUNK or time.monotonic() >= until:
            break
    with stores.engine.connect() as connection:
        forgotten = chord_counts.forget_old(connection, CHORDS_KEPT)
        if keep:
            archive.open_next_month(connection)
        dropped = archive.drop_oldest_month(connection, keep_archived) if keep_archived else None
    return {"archived": archived, "chords": forgotten, "months": int(dropped is not None)}
