"""Jobs that were revoked while a worker held them: the row keeps it, so that the job ends should it ever come back.

The worker is told too, by Celery's own remote control, and mostly ends the job itself. But that message reaches nobody
who is stopped, dead or cut off. So the row is marked first (`mark`), then the ledger (`tell`), and a job so marked is
never admitted again: what takes it back ends it, in Lua (`put_back`) as in SQL (`store.apply`), and the answer to a
claim says that it was revoked. What died between the two marks is repaired by the sweep, and by a rebuild (`tell_all`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from sqlalchemy import Connection, text

from celery_capacity.routing.errors import storable
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.ledger.replies import Cancelled
from celery_capacity.routing.model.states import FINAL, State
from celery_capacity.routing.store.job_transitions import REVOKED

#: Characters of a stamp by which a job is found.
STAMP_LENGTH: Final = 1000
#: Ids read in one statement.
PAGE: Final = 1000
#: Looks at a job that moves between a worker and the backlog meanwhile; the sweep goes on with what is left.
TRIES: Final = 3

_FINAL: Final = ", ".join(f"'{state.value}'" for state in sorted(FINAL))
_MARK: Final = text(f"""
UPDATE jobs SET revoked_at = coalesce(revoked_at, now())
WHERE id = ANY(CAST(:ids AS text[])) AND state NOT IN ({_FINAL}) RETURNING id
""")
_OPEN: Final = text(
    "SELECT id FROM jobs WHERE revoked_at IS NOT NULL AND finished_at IS NULL AND id > :after ORDER BY id LIMIT :most"
)
_STAMPED: Final = text(
    "SELECT id FROM jobs WHERE stamps IS NOT NULL AND finished_at IS NULL AND stamps @> CAST(:stamp AS jsonb)"
)
_BACKLOG: Final = text(
    "SELECT id FROM jobs WHERE state IN ('accepted', 'waiting') AND queue = :queue AND id > :after "
    "ORDER BY id LIMIT :most"
)


def mark(connection: Connection, jobs: Sequence[str]) -> list[str]:
    """Keep in the rows of these jobs that they were revoked; returns those that have not ended."""
    return sorted(connection.execute(_MARK, {"ids": list(jobs)}).scalars()) if jobs else []


def still_open(connection: Connection) -> Iterator[list[str]]:
    """What was revoked and has not ended, page by page."""
    return _pages(connection, _OPEN, {})


def waiting_in(connection: Connection, queue: str) -> Iterator[list[str]]:
    """The jobs of a queue that are accepted or wait, page by page."""
    return _pages(connection, _BACKLOG, {"queue": queue})


def _pages(connection: Connection, query: Any, values: Mapping[str, str]) -> Iterator[list[str]]:
    after = ""
    while ids := list(connection.execute(query, {**values, "after": after, "most": PAGE}).scalars()):
        yield ids
        after = ids[-1]


def stamped(connection: Connection, headers: Mapping[str, Any]) -> list[str]:
    """The jobs that have not ended and carry one of these stamps: {name: value or list of values}."""
    found: set[str] = set()
    for name, values in headers.items():
        for value in _comparable(values):
            stamp = json.dumps({storable(name, STAMP_LENGTH): [value]})
            found |= set(connection.execute(_STAMPED, {"stamp": stamp}).scalars())
    return sorted(found)


def stamps_json(names: Iterable[Any], stamps: Mapping[str, Any]) -> str:
    """The column `stamps` of a message with these stamped headers."""
    return json.dumps({storable(str(name), STAMP_LENGTH): _comparable(stamps.get(name)) for name in names})


def _comparable(stamp: Any) -> list[Any]:
    """The values of a stamp, one or several, that a job can be found by: text and numbers."""
    values = stamp if isinstance(stamp, (list, tuple, set, frozenset)) else (stamp,)
    texts = [storable(value, STAMP_LENGTH) for value in values if isinstance(value, str)]
    return texts + [value for value in values if isinstance(value, (int, float)) and math.isfinite(value)]


def tell(ledger: Ledger, job: str) -> Cancelled:
    """The ledger's part: end a job that waits, and mark one that a worker holds (`held`)."""
    for _ in range(TRIES):
        cancelled = ledger.cancel(job, State.CANCELLED.value, REVOKED)
        if cancelled.verdict != "held" or ledger.revoke(job):
            break
    return cancelled


def tell_all(connection: Connection, ledger: Ledger, between: Callable[[], None] = lambda: None) -> None:
    """Tell new books what was revoked before they were opened. (What ends by it is written with the stream.) `between`
    is called before each job, and may raise."""
    for jobs in still_open(connection):
        for job in jobs:
            between()
            tell(ledger, job)
