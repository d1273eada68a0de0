"""Forget rows of workers that left long ago, and remove private queues that no script knows any more."""

from __future__ import annotations

import re
from typing import Final

from celery import Celery
from sqlalchemy import Connection, text

from celery_capacity.routing.ledger import keys, snapshot
from celery_capacity.workers.process.stores import Stores

#: Multiple of the setting LOST after which the row of an incarnation that has left is forgotten: 21 h at the usual
#: 75 s. Attempts name their worker by text, and need no row.
KEEP_TIMES: Final = 1000.0
#: A private queue's name ends with the incarnation, a UUID.
_PRIVATE: Final = re.compile(r"worker\..+\.[0-9a-f]{32}")
#: Keys read in one step of a scan.
CHUNK: Final = 1000

_FORGET: Final = text("""
DELETE FROM workers w WHERE w.status IN ('left', 'lost') AND w.left_at < now() - make_interval(secs => :keep)
  AND NOT EXISTS (SELECT 1 FROM jobs WHERE jobs.state IN ('admitted', 'running') AND jobs.incarnation = w.incarnation)
""")
_ALIVE: Final = text("SELECT incarnation FROM workers WHERE status IN ('ready', 'draining')")


def run_once(app: Celery, stores: Stores) -> dict[str, int]:
    """Forget rows of former workers, and remove their private queues.

    Counts: `forgotten` rows of workers, `queues` removed.
    """
    # The queues are read first: a worker that has a queue by now was in Postgres before.
    private_queues = _private_queues(stores)
    forgotten = without_ledger(app, stores)
    with stores.engine.connect() as connection:
        alive = _alive(connection)
    dead = [queue for queue, incarnation in private_queues.items() if incarnation not in alive]
    removed = int(stores.redis.unlink(*dead)) if dead else 0
    return {**forgotten, "queues": removed}


def without_ledger(app: Celery, stores: Stores) -> dict[str, int]:
    """Do the part that needs Postgres alone. Counts: `forgotten` rows of workers."""
    with stores.engine.connect() as connection:
        keep = stores.settings.lost_after * KEEP_TIMES
        return {"forgotten": connection.execute(_FORGET, {"keep": keep}).rowcount}


def _alive(connection: Connection) -> set[str]:
    return set(connection.execute(_ALIVE).scalars())


def _private_queues(stores: Stores) -> dict[str, str]:
    """Return the private queues that hold messages, and the incarnation of each."""
    client = stores.redis
    names = [snapshot.text(key) for key in client.scan_iter(match=keys.PRIVATE_QUEUES, count=CHUNK, _type="list")]
    # A list of another program may have a similar name, but no incarnation that looks like ours.
    return {name: name.rpartition(".")[2] for name in names if _PRIVATE.fullmatch(name)}
