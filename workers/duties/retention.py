"""Jobs that ended long ago go into the archive, and unique keys that keep nobody out any more are forgotten."""

from __future__ import annotations

import secrets
from typing import Final

from celery import Celery

from routing import gates, retention
from workers.stores import Stores

#: Statements of one pass: at the usual sweep interval 1,000 jobs a second, more than a platform ends.
MOST: Final = 10
#: Seconds for which a unique key is kept, whatever became of its job.
FORGET_AFTER: Final = 300.0


def run_once(app: Celery, stores: Stores) -> dict[str, int]:
    """Counts: `archived` jobs, `forgotten` keys."""
    archived, keep = 0, stores.settings.keep_finished
    for _ in range(MOST if keep else 0):
        with stores.engine.connect() as connection:
            moved = retention.archive_finished(connection, keep, retention.CHUNK)
        archived += moved
        if moved < retention.CHUNK:
            break
    # From a random place on: each pass looks at some of the keys, and all of them come round.
    with stores.engine.connect() as connection:
        forgotten = gates.forget_keys(connection, secrets.token_hex(32), FORGET_AFTER)
        forgotten += gates.forget_keys(connection, "", FORGET_AFTER)
    return {"archived": archived, "forgotten": forgotten}
