"""Learned run times in Postgres, by the rule of `routing.policy.learned_times`.

Each pass reads the jobs that ended since the last one, by the index of their ends. So no submission and no end of a job
pays for it.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, text

from celery_capacity.routing.model.expected import CLASSES
from celery_capacity.routing.model.request import KNOWN_EVERYWHERE, split_suffix
from celery_capacity.routing.policy.learned_times import Histogram, Kind

#: Ended jobs that one call reads: some 20 ms of Postgres. The next call goes on behind them.
MAX_READ: Final = 10_000
#: Seconds by which a pass stays behind the clock, since outcomes are written in batches, not quite in order.
LAG: Final = 1.0
#: Pairs of task and request that are kept: requests that each call computes may be many.
MAX_KEPT: Final = 10_000
#: Pairs that a submitter reads, those of the newest jobs.
MAX_USED: Final = 2000

# The row is locked: of two passes at once, the second goes on where the first ended.
_BEGIN: Final = text(
    "SELECT read_until, clock_timestamp() - make_interval(secs => :lag) AS horizon FROM run_times_read FOR UPDATE"
)
_ENDED: Final = text("""
WITH ended AS MATERIALIZED (
  SELECT name, shape, finished_at, state, extract(epoch FROM finished_at - started_at) * 1000 AS ms
  FROM jobs WHERE finished_at > :since AND finished_at <= :horizon ORDER BY finished_at LIMIT :most
)
SELECT name, shape, width_bucket(greatest(ceil(ms), 1)::bigint - 1, CAST(:classes AS bigint[])), count(*),
  (SELECT CASE WHEN count(*) < :most THEN :horizon ELSE max(finished_at) END FROM ended)
FROM ended WHERE state = 'succeeded' AND ms IS NOT NULL AND NOT name LIKE ANY(CAST(:everywhere AS text[]))
GROUP BY 1, 2, 3
UNION ALL SELECT '', '', 0, 0, (SELECT CASE WHEN count(*) < :most THEN :horizon ELSE max(finished_at) END FROM ended)
""")
_STORED: Final = text("""
SELECT task, request, count, expected_ms, weights FROM run_times
JOIN unnest(CAST(:tasks AS text[]), CAST(:requests AS text[])) AS x (task, request) USING (task, request)
""")
_WRITE: Final = text("""
INSERT INTO run_times AS r (task, request, expected_ms, spread_ms, count, weights, updated_at)
SELECT task, request, expected_ms, spread_ms, count, weights, clock_timestamp()
FROM jsonb_to_recordset(CAST(:rows AS jsonb))
  AS x (task text, request text, expected_ms bigint, spread_ms bigint, count bigint, weights jsonb)
ON CONFLICT (task, request) DO UPDATE SET expected_ms = excluded.expected_ms, spread_ms = excluded.spread_ms,
  count = excluded.count, weights = excluded.weights, updated_at = excluded.updated_at
""")
_FORGET: Final = text("""
DELETE FROM run_times WHERE (task, request) IN (
  SELECT task, request FROM run_times ORDER BY updated_at DESC OFFSET :most)
""")
_READ_UNTIL: Final = text("UPDATE run_times_read SET read_until = :until")


class Learning(NamedTuple):
    """Result of a call: the number of jobs that it learned from. `more`: others have ended that it did not read."""

    jobs: int
    more: bool


def learn(connection: Connection) -> Learning:
    """Learn from the jobs that succeeded since the last call. The caller's connection commits."""
    since, horizon = connection.execute(_BEGIN, {"lag": LAG}).one()
    values = {"since": since, "horizon": horizon, "most": MAX_READ, "classes": list(CLASSES)}
    everywhere = [f"{beginning}%" for beginning in KNOWN_EVERYWHERE]
    runs: dict[Kind, dict[int, int]] = defaultdict(dict)
    until = horizon
    for name, shape, rank, number, read_until in connection.execute(_ENDED, {**values, "everywhere": everywhere}):
        until = read_until
        if number:
            by_class = runs[name, split_suffix(shape)[0]]
            rank = min(rank, len(CLASSES) - 1)
            by_class[rank] = by_class.get(rank, 0) + number
    if runs:
        stored = _stored(connection, list(runs))
        rows = []
        for kind, by_class in runs.items():
            histogram = stored.get(kind) or Histogram()
            histogram.add(by_class)
            rows.append(_row(kind, histogram))
        connection.execute(_WRITE, {"rows": json.dumps(rows)})
        connection.execute(_FORGET, {"most": MAX_KEPT})
    connection.execute(_READ_UNTIL, {"until": until})
    return Learning(sum(number for by_class in runs.values() for number in by_class.values()), until < horizon)


def _row(kind: Kind, histogram: Histogram) -> dict[str, Any]:
    weights = {str(rank): round(weight, 6) for rank, weight in histogram.weights.items() if weight > 1e-6}
    task, request = kind
    return {
        "task": task,
        "request": request,
        "expected_ms": histogram.expected_ms,
        "spread_ms": histogram.spread_ms,
        "count": histogram.count,
        "weights": weights,
    }


def _stored(connection: Connection, kinds: list[Kind]) -> dict[Kind, Histogram]:
    values = {"tasks": [task for task, _ in kinds], "requests": [request for _, request in kinds]}
    return {
        (task, request): Histogram(count, expected_ms, {int(rank): weight for rank, weight in weights.items()})
        for task, request, count, expected_ms, weights in connection.execute(_STORED, values)
    }


_LEARNED: Final = text(
    "SELECT task, request, expected_ms FROM run_times WHERE expected_ms > 0 ORDER BY updated_at DESC LIMIT :most"
)


def learned(connection: Connection) -> dict[Kind, int]:
    """Return the learned times in milliseconds, by task and request; those of the newest jobs, where they are many."""
    return {(row[0], row[1]): row[2] for row in connection.execute(_LEARNED, {"most": MAX_USED})}


def means(connection: Connection, kinds: Iterable[Kind]) -> dict[Kind, int]:
    """Return the mean run times in milliseconds of these tasks and requests, of those that are known."""
    stored = _stored(connection, list(dict.fromkeys(kinds)))
    return {kind: histogram.mean_ms for kind, histogram in stored.items() if histogram.expected_ms}
