"""Jobs that were revoked while a worker held them: the row keeps a mark, so that the job ends if it ever comes back.

Celery's own remote control tells the worker too, which mostly ends the job itself. But that message does not reach a
worker that is stopped, dead or cut off. So the row is marked first (`mark`), then the ledger (`tell`). A marked job is
never admitted again: the code that takes it back ends it, in Lua (`put_back`) and in SQL (`job_transitions.apply`), and
the reply to a claim says that it was revoked. The sweep, and a rebuild (`tell_all`), repair a crash between both marks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection, select, text

from celery_capacity.routing.database import job_conditions, schema
from celery_capacity.routing.errors import storable
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.ledger.replies import Cancelled, CancelVerdict
from celery_capacity.routing.model.states import FINAL, State, Step
from celery_capacity.routing.store.job_transitions import REVOKED

#: Characters of a stamp that are kept and compared.
STAMP_LENGTH: Final = 1000
#: Ids read in one statement.
PAGE: Final = 1000
#: Tries for a job that moves between a worker and the backlog meanwhile. The sweep goes on with the jobs left.
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
_STANDING: Final = text("""
SELECT id, state, worker, epoch, attempt, step FROM jobs WHERE id = ANY(CAST(:ids AS text[]))
UNION ALL
SELECT * FROM (
  SELECT DISTINCT ON (id) id, state, worker, epoch, attempt, :dropped
  FROM jobs_archive WHERE id = ANY(CAST(:ids AS text[])) ORDER BY id, seq DESC
) AS archived WHERE NOT EXISTS (SELECT FROM jobs WHERE jobs.id = archived.id)
""")
_LIVE: Final = text("SELECT count(*) FROM workers WHERE status IN ('ready', 'draining')")


@dataclass(frozen=True, slots=True)
class Standing:
    """State of a job, the worker of its newest attempt, and how far it has come: (epoch, attempt, step)."""

    state: State
    worker: str | None
    rank: tuple[int, int, int]


def standing(connection: Connection, jobs: Sequence[str]) -> dict[str, Standing]:
    """Return the states of those of these jobs that are known, archived ones included."""
    rows = connection.execute(_STANDING, {"ids": list(jobs), "dropped": int(Step.DROPPED)})
    return {row[0]: Standing(State(row[1]), row[2], (row[3], row[4], row[5])) for row in rows}


def open_jobs(connection: Connection, task: str | None, group: str | None, state: State | None) -> list[str]:
    """Return the jobs that have not ended and match all that is given, oldest first.

    `task`: a pattern, in which `*` stands for any characters. `group`: as in `job_conditions.in_group`.
    """
    columns = schema.jobs.c
    query = select(columns.id).where(columns.state.not_in(sorted(FINAL))).order_by(columns.seq)
    if task is not None:
        query = query.where(job_conditions.matches(columns.name, task))
    if state is not None:
        query = query.where(columns.state == state)
    if group is not None:
        query = query.where(job_conditions.in_group(columns, group))
    return list(connection.execute(query).scalars())


def live_workers(connection: Connection) -> int:
    return int(connection.execute(_LIVE).scalar_one())


def mark(connection: Connection, jobs: Sequence[str]) -> list[str]:
    """Mark the rows of these jobs as revoked; return those that have not ended."""
    return sorted(connection.execute(_MARK, {"ids": list(jobs)}).scalars()) if jobs else []


def still_open(connection: Connection) -> Iterator[list[str]]:
    """Return the revoked jobs that have not ended, page by page."""
    return _pages(connection, _OPEN, {})


def waiting_in(connection: Connection, queue: str) -> Iterator[list[str]]:
    """Return the jobs of a queue that are accepted or wait, page by page."""
    return _pages(connection, _BACKLOG, {"queue": queue})


def _pages(connection: Connection, query: Any, values: Mapping[str, str]) -> Iterator[list[str]]:
    after = ""
    while ids := list(connection.execute(query, {**values, "after": after, "most": PAGE}).scalars()):
        yield ids
        after = ids[-1]


def stamped(connection: Connection, headers: Mapping[str, Any]) -> list[str]:
    """Return the jobs that have not ended and carry one of these stamps: {name: value or list of values}."""
    ids: set[str] = set()
    for name, values in headers.items():
        for value in _comparable(values):
            stamp = json.dumps({storable(name, STAMP_LENGTH): [value]})
            ids |= set(connection.execute(_STAMPED, {"stamp": stamp}).scalars())
    return sorted(ids)


def stamps_json(names: Iterable[Any], stamps: Mapping[str, Any]) -> str:
    """Return the column `stamps` of a message with these stamped headers, as JSON."""
    return json.dumps({storable(str(name), STAMP_LENGTH): _comparable(stamps.get(name)) for name in names})


def _comparable(stamp: Any) -> list[Any]:
    """Return those values of a stamp that a job can be found by: text and finite numbers."""
    values = stamp if isinstance(stamp, (list, tuple, set, frozenset)) else (stamp,)
    texts = [storable(value, STAMP_LENGTH) for value in values if isinstance(value, str)]
    return texts + [value for value in values if isinstance(value, (int, float)) and math.isfinite(value)]


def tell(ledger: Ledger, job: str) -> Cancelled:
    """Tell the ledger of a revoked job: end a job that waits, and mark a job that a worker holds (`held`)."""
    for _ in range(TRIES):
        cancelled = ledger.cancel(job, State.CANCELLED, REVOKED)
        if cancelled.verdict is not CancelVerdict.HELD or ledger.revoke(job):
            break
    return cancelled


def tell_all(connection: Connection, ledger: Ledger, between: Callable[[], None] = lambda: None) -> None:
    """Tell new books of the jobs that were revoked before the books were opened.

    The ends that follow are written with the stream. `between` is called before each job, and may raise.
    """
    for jobs in still_open(connection):
        for job in jobs:
            between()
            tell(ledger, job)
