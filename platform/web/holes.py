"""Holes in the chart of runs: what was free on a worker at a moment, which jobs waited then, and why not there.

Postgres keeps when each job was submitted, due, admitted and ended, and the capacity of each life of a worker. It does
not keep which worker was cordoned or reserved, which queue was paused, or where a job stood in the order. So the reason
of a job that would have fitted stays open.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from typing import Any, Final

from sqlalchemy import Connection, text

from celery_capacity.platform.web import runs
from celery_capacity.routing.model import amounts
from celery_capacity.routing.model.reasons import Reason
from celery_capacity.routing.model.request import Request, alternatives_of, terms_of
from celery_capacity.routing.policy.feasibility import is_large_enough
from celery_capacity.routing.policy.placement import Book, shortages

#: Rows of each kind that are examined, and groups that are listed.
EXAMINED: Final = 10_000
MAX_GROUPS: Final = 20

_INCARNATION: Final = text("""
SELECT capacity, labels, left_at FROM workers WHERE name = :worker AND started_at <= :at
ORDER BY started_at DESC LIMIT 1
""")

# A job waited if it was there and due, had not ended, and no attempt of it was on a worker.
_WAITED: Final = text(
    """
WITH ended AS MATERIALIZED (
  SELECT * FROM jobs WHERE finished_at > :at ORDER BY finished_at LIMIT :most
), backlog AS MATERIALIZED (
  SELECT * FROM jobs WHERE state IN ('accepted', 'waiting') ORDER BY (- priority), seq LIMIT :most
), under_way AS MATERIALIZED (
  SELECT newest.* FROM unnest(ARRAY['running', 'admitted']) AS s (state) CROSS JOIN LATERAL (
    SELECT * FROM jobs WHERE jobs.state = s.state ORDER BY seq DESC LIMIT :most
  ) AS newest
), chosen AS (
  SELECT * FROM ended UNION ALL SELECT * FROM backlog UNION ALL SELECT * FROM under_way
)
SELECT name, shape, priority, count(*) AS jobs, min(seq) AS seq, (array_agg(id ORDER BY seq))[1] AS first,
  extract(epoch FROM CAST(:at AS timestamptz) - min(greatest(submitted_at, due_at)))::float AS waited
FROM chosen CROSS JOIN LATERAL (
  SELECT count(*) AS held FROM (
    SELECT admitted_at, ended_at FROM attempts WHERE job_id = chosen.id ORDER BY epoch DESC, attempt DESC
    LIMIT :attempts
  ) AS tries WHERE tries.admitted_at <= :at AND (tries.ended_at IS NULL OR tries.ended_at > :at)
) AS attempts
WHERE greatest(submitted_at, due_at, not_before) <= :at AND held = 0
GROUP BY name, shape, priority ORDER BY priority DESC, min(seq) LIMIT :groups
""".replace("SELECT *", "SELECT id, seq, name, shape, priority, submitted_at, due_at, not_before")
)


def read_document(connection: Connection, worker: str, at: datetime) -> dict[str, Any]:
    """Return the object of `/api/v1/runs/hole`. `free` is null where the worker did not live at that time."""
    incarnation = connection.execute(_INCARNATION, {"worker": worker, "at": at}).one_or_none()
    lived = incarnation is not None and (incarnation.left_at is None or incarnation.left_at > at)
    held = runs.read(connection, at, at, runs.MAX_RUNS)
    book = Book(worker, {}, {})
    if incarnation is not None:
        book = Book(worker, amounts.from_people(incarnation.capacity), {}, labels=incarnation.labels)
        for row in held.rows:
            if row.worker == worker and (row.ended_at is None or row.ended_at > at):
                book = book.holding(Request.from_people(row.request))
    values = {"at": at, "most": EXAMINED, "groups": MAX_GROUPS, "attempts": runs.MAX_ATTEMPTS}
    groups = connection.execute(_WAITED, values).all()
    return {
        "worker": worker,
        "at": at.isoformat(timespec="milliseconds"),
        "free": _free(book) if lived else None,
        "waited": [_group(row, book, lived) for row in groups],
    }


def _free(book: Book) -> dict[str, int | float]:
    return amounts.to_people(tuple((name, max(0, book.free(name))) for name in book.capacity))


def _group(row: Any, book: Book, lived: bool) -> dict[str, Any]:
    requests, terms = alternatives_of(row.shape), terms_of(row.shape)
    request = next((it for it in requests if lived and _reason(it, terms, book) is None), requests[0])
    reason = Reason.NO_WORKER if not lived else _reason(request, terms, book)
    judged = book if reason is Reason.NO_ROOM else replace(book, allocated={})
    short = {line.resource: line.asked - max(0, line.free) for line in shortages(request, judged)} if lived else {}
    people = amounts.to_people(tuple(short.items()))
    return {
        "task": row.name,
        "priority": row.priority,
        "request": request.to_people(),
        "jobs": row.jobs,
        "waited_seconds": round(max(0.0, row.waited), 3),
        "first": row.first,
        "why": None if reason is None else reason.value,
        "short": {name: amount for name, amount in people.items() if name in short and amount > 0},
    }


def _reason(request: Request, terms: str, book: Book) -> Reason | None:
    """Return the reason for which a worker did not take a request; None where it had room."""
    if not book.serves(request):
        return Reason.NO_QUEUE
    if not book.allows(terms):
        return Reason.NO_LABEL
    if not is_large_enough(request, book):
        return Reason.TOO_LARGE
    return Reason.NO_ROOM if shortages(request, book) else None
