"""The last hour of the cluster, minute by minute: allocated CPUs, waiting jobs, starts and ends, and waits.

All comes from the rows of jobs, under both authorities, and nothing is kept for it. The numbers of now are known, and
the minutes are counted back from them. Of each kind of row the newest are read, at most `MAX_ROWS`. Where there are
more, only the minutes after the oldest of them are told. Of a job that ran several times only the last run counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import Connection, text

#: Minutes that are told, and the seconds of each.
MINUTES: Final = 60
SECONDS: Final = 60
#: Rows of each kind that are read: those that ended, and the newest of each state that has not.
MAX_ROWS: Final = 10_000
#: States of jobs that have not ended, and those among them that hold CPUs.
OPEN: Final = ["accepted", "waiting", "admitted", "running"]

# A job that started holds CPUs until it ends. One that ended without a start left the waiting jobs.
_MINUTES: Final = text("""
WITH ended AS MATERIALIZED (
  SELECT submitted_at, due_at, started_at, finished_at, request FROM jobs
  WHERE finished_at > :since AND finished_at <= :until ORDER BY finished_at DESC LIMIT :most
), open AS MATERIALIZED (
  SELECT newest.* FROM unnest(CAST(:open AS text[])) AS s (state) CROSS JOIN LATERAL (
    SELECT jobs.state, submitted_at, due_at, started_at, admitted_at, request FROM jobs
    WHERE jobs.state = s.state ORDER BY seq DESC LIMIT :most
  ) AS newest
), lives AS (
  SELECT greatest(submitted_at, due_at) AS came, started_at AS began, finished_at AS ended, request FROM ended
  UNION ALL
  SELECT greatest(submitted_at, due_at), CASE WHEN state IN ('admitted', 'running')
    THEN coalesce(started_at, admitted_at) END, NULL, request FROM open
), changes AS (
  SELECT came AS at, 1 AS came, 0 AS began, 0 AS ended, 0 AS gone, 0.0 AS cpus, NULL::float AS waited FROM lives
  UNION ALL
  SELECT began, 0, 1, 0, 0, coalesce((request->>'cpus')::float, 0), extract(epoch FROM began - came)::float FROM lives
  UNION ALL
  SELECT ended, 0, 0, 1, CASE WHEN began IS NULL THEN 1 ELSE 0 END,
    CASE WHEN began IS NULL THEN 0 ELSE - coalesce((request->>'cpus')::float, 0) END, NULL FROM lives
)
SELECT floor(extract(epoch FROM at - :since) / :seconds)::int AS minute, sum(came) AS came, sum(began) AS began,
  sum(ended) AS ended, sum(gone) AS gone, sum(cpus) AS cpus,
  percentile_cont(0.5) WITHIN GROUP (ORDER BY waited) AS p50,
  percentile_cont(0.95) WITHIN GROUP (ORDER BY waited) AS p95,
  (SELECT CASE WHEN count(*) >= :most THEN min(finished_at) END FROM ended) AS ended_from,
  (SELECT max(oldest) FROM (SELECT CASE WHEN count(*) >= :most THEN min(submitted_at) END AS oldest
     FROM open GROUP BY state) AS cut) AS open_from
FROM changes WHERE at > :since AND at <= :until GROUP BY minute ORDER BY minute
""")


def read(connection: Connection, now: datetime, seen: Mapping[str, Any]) -> dict[str, Any]:
    """Return the object of `/api/v1/last-hour`. `seen`: the object of `cluster --json`, with the numbers of now."""
    since = now - timedelta(seconds=MINUTES * SECONDS)
    values = {"since": since, "until": now, "open": OPEN, "most": MAX_ROWS, "seconds": SECONDS}
    rows = connection.execute(_MINUTES, values).all()
    first = max((cut for row in rows[:1] for cut in (row.ended_from, row.open_from) if cut is not None), default=since)
    resources = seen["resources"]
    counted = _back(rows, resources["allocated_cpus"], resources["waiting_jobs"], since)
    shown = counted[math.ceil((first - since).total_seconds() / SECONDS) :]
    return {
        "minutes": shown,
        "seconds": SECONDS,
        "whole": first <= since,
        "total_cpus": resources["total_cpus"],
        "since": shown[0]["from"] if shown else _text(now),
        "until": _text(now),
    }


def _back(rows: Sequence[Any], allocated: float, waiting: int, since: datetime) -> list[dict[str, Any]]:
    """Return the minutes, counted back from the numbers of now."""
    by_minute = {row.minute: row for row in rows}
    minutes: list[dict[str, Any]] = []
    for number in reversed(range(MINUTES)):
        row = by_minute.get(number)
        minutes.append(
            {
                "from": _text(since + timedelta(seconds=number * SECONDS)),
                "allocated_cpus": round(max(0.0, allocated), 3),
                "waiting": max(0, waiting),
                "started_per_second": round((row.began if row else 0) / SECONDS, 4),
                "ended_per_second": round((row.ended if row else 0) / SECONDS, 4),
                "wait_p50_seconds": None if row is None or row.p50 is None else round(max(0.0, row.p50), 3),
                "wait_p95_seconds": None if row is None or row.p95 is None else round(max(0.0, row.p95), 3),
            }
        )
        if row is not None:
            allocated -= float(row.cpus)
            waiting -= int(row.came - row.began - row.gone)
    return minutes[::-1]


def _text(moment: datetime) -> str:
    return moment.isoformat(timespec="milliseconds")
