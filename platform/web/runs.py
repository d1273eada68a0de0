"""Runs: which attempt was on which worker, and when, for the chart of a stretch of time.

Postgres has no index of attempts by time. So the jobs are found by the index of their ends and by that of their states,
and their attempts by the primary key. A read takes at most `MAX_RUNS` jobs of each kind, and
examines at most `EXAMINED`, however many there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from sqlalchemy import Connection, text

from celery_capacity.routing.model.states import State

#: Runs of an answer, where a request does not say, and at most.
RUNS: Final = 2000
MAX_RUNS: Final = 10_000
#: Attempts of a job that are read, the newest ones.
MAX_ATTEMPTS: Final = 50
#: Ended jobs that are examined: those that a worker had, and those cancelled while they waited.
EXAMINED: Final = 2 * MAX_RUNS
#: Workers of an answer: those of the runs, and others that live, by name.
MAX_WORKERS: Final = 2000
#: States of a job whose last run has ended, or has not, while the job itself has not ended.
UNDER_WAY: Final = (State.RUNNING, State.ADMITTED, State.WAITING, State.SCHEDULED, State.REPLACED)

# A job that ended later may have run in the stretch too. The first ends after it are those of the shortest such jobs.
_RUNS: Final = text("""
WITH ended AS MATERIALIZED (
  SELECT id, seq, name, request, worker FROM jobs WHERE finished_at >= :since AND finished_at <= :until
  ORDER BY finished_at DESC LIMIT :examined
), later AS MATERIALIZED (
  SELECT id, seq, name, request, worker FROM jobs WHERE finished_at > :until ORDER BY finished_at LIMIT :examined
), under_way AS MATERIALIZED (
  SELECT newest.* FROM unnest(CAST(:states AS text[])) AS s (state) CROSS JOIN LATERAL (
    SELECT id, seq, name, request, attempt FROM jobs WHERE jobs.state = s.state ORDER BY seq DESC LIMIT :most
  ) AS newest WHERE newest.attempt > 0
), chosen AS (
  (SELECT id, seq, name, request FROM ended WHERE worker IS NOT NULL LIMIT :most)
  UNION ALL (SELECT id, seq, name, request FROM later WHERE worker IS NOT NULL LIMIT :most)
  UNION ALL SELECT id, seq, name, request FROM under_way
), cut AS (
  SELECT (SELECT count(*) FROM ended WHERE worker IS NOT NULL) >= :most OR (SELECT count(*) FROM ended) >= :examined
    OR (SELECT count(*) FROM later WHERE worker IS NOT NULL) >= :most OR (SELECT count(*) FROM later) >= :examined
    AS cut
)
SELECT * FROM cut LEFT JOIN (
  SELECT chosen.*, runs.* FROM chosen CROSS JOIN LATERAL (
    SELECT epoch, attempt, worker, admitted_at, started_at, ended_at, outcome FROM attempts
    WHERE job_id = chosen.id ORDER BY epoch DESC, attempt DESC LIMIT :attempts
  ) AS runs
  WHERE admitted_at <= :until AND (ended_at IS NULL OR ended_at >= :since)
  ORDER BY admitted_at DESC, seq DESC LIMIT :most
) AS runs ON true ORDER BY admitted_at DESC, seq DESC
""")

_WORKERS: Final = text("""
SELECT DISTINCT ON (name) name, capacity, status FROM workers
WHERE name = ANY(CAST(:names AS text[])) OR status IN ('ready', 'draining')
ORDER BY name, started_at DESC LIMIT :most
""")


@dataclass(frozen=True, slots=True)
class Runs:
    """Attempts in a stretch of time, the last admitted first. `whole`: False where there are more than were read."""

    rows: Sequence[Any]
    whole: bool
    since: datetime
    until: datetime


def read(connection: Connection, since: datetime, until: datetime, limit: int) -> Runs:
    """Read the attempts that a worker held at some time of a stretch. `limit`: at most `MAX_RUNS`."""
    states = [state.value for state in UNDER_WAY]
    values = {"since": since, "until": until, "most": limit + 1, "states": states, "attempts": MAX_ATTEMPTS}
    values["examined"] = max(EXAMINED, limit + 1)
    answer = connection.execute(_RUNS, values).all()
    rows = [row for row in answer if row.id is not None]
    return Runs(rows[:limit], len(rows) <= limit and not answer[0].cut, since, until)


def read_document(connection: Connection, since: datetime, until: datetime, limit: int) -> dict[str, Any]:
    """Return the object of `/api/v1/runs`."""
    runs = read(connection, since, until, limit)
    names = sorted({str(row.worker) for row in runs.rows})
    workers = connection.execute(_WORKERS, {"names": names, "most": MAX_WORKERS}).all()
    return {
        "runs": [_run(row) for row in runs.rows],
        "workers": [
            {"name": row.name, "cpus": row.capacity.get("cpus", 0), "status": row.status.strip()} for row in workers
        ],
        "whole": runs.whole,
        "since": _text(since),
        "until": _text(until),
    }


def _run(row: Any) -> dict[str, Any]:
    return {
        "job": row.id,
        "task": row.name,
        "epoch": row.epoch,
        "attempt": row.attempt,
        "worker": row.worker,
        "cpus": row.request.get("cpus", 0),
        "admitted_at": _text(row.admitted_at),
        "started_at": _text(row.started_at),
        "ended_at": _text(row.ended_at),
        "outcome": row.outcome,
    }


def _text(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat(timespec="milliseconds")
