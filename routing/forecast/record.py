"""Record of estimates: some estimated starts of waiting jobs, and when the jobs did start.

The duty `estimates` notes a few of them now and then, and compares them when their jobs have started. So no start and
no submission pays for it. The table stays small: open estimates and compared ones are bounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection, text

from celery_capacity.routing.store.controls import NOT_PAUSED

#: Estimates whose jobs have not started: beyond them no more are made.
MAX_OPEN: Final = 50
#: Compared estimates that are kept, the newest ones.
KEPT: Final = 1000


@dataclass(frozen=True, slots=True)
class Errors:
    """Errors of the estimates so far, in seconds: half of them at most `median`, nine of ten at most `p90`."""

    compared: int
    median: float
    p90: float

    def to_json(self) -> dict[str, Any]:
        return {
            "compared": self.compared,
            "median_seconds": round(self.median, 3),
            "p90_seconds": round(self.p90, 3),
        }


_COMPARE: Final = text("""
UPDATE estimates AS e SET started_at = s.started_at FROM estimates AS o
CROSS JOIN LATERAL (
  SELECT min(a.started_at) AS started_at FROM attempts a WHERE a.job_id = o.job AND a.started_at >= o.made_at) AS s
WHERE o.started_at IS NULL AND s.started_at IS NOT NULL AND e.job = o.job
""")
# A job that ended, was paused or waits for something else makes its estimate void.
_FORGET: Final = text(f"""
DELETE FROM estimates AS e WHERE started_at IS NULL
  AND NOT EXISTS (SELECT FROM jobs WHERE id = e.job AND (state IN ('admitted', 'running')
    OR (state IN ('accepted', 'waiting') AND {NOT_PAUSED})))
""")
_PRUNE: Final = text("""
DELETE FROM estimates WHERE job IN (
  SELECT job FROM estimates WHERE started_at IS NOT NULL ORDER BY started_at DESC, job OFFSET :most)
""")
_OPEN: Final = text("SELECT count(*) FROM estimates WHERE started_at IS NULL")
_NOTE: Final = text("""
INSERT INTO estimates (job, starts_at)
SELECT job, to_timestamp(ms / 1000.0) FROM unnest(CAST(:jobs AS text[]), CAST(:times AS bigint[])) AS x (job, ms)
ON CONFLICT (job) DO NOTHING
""")
_ERRORS: Final = text("""
SELECT count(*), percentile_disc(0.5) WITHIN GROUP (ORDER BY off), percentile_disc(0.9) WITHIN GROUP (ORDER BY off)
FROM (SELECT abs(extract(epoch FROM started_at - starts_at))::float AS off FROM estimates
      WHERE started_at IS NOT NULL) AS e
""")
_EMPTY: Final = text("SELECT NOT EXISTS (SELECT FROM estimates WHERE started_at IS NULL)")


def compare(connection: Connection) -> int:
    """Note the starts of the jobs that have an open estimate; return how many. Void and old estimates are deleted."""
    if connection.execute(_EMPTY).scalar_one():
        return 0
    compared = connection.execute(_COMPARE).rowcount
    connection.execute(_FORGET)
    if compared:
        connection.execute(_PRUNE, {"most": KEPT})
    return compared


def is_full(connection: Connection) -> bool:
    """Return True if so many estimates are open that no more are made."""
    return int(connection.execute(_OPEN).scalar_one()) >= MAX_OPEN


def note(connection: Connection, starts: Mapping[str, int]) -> int:
    """Note estimated starts by job, in milliseconds since 1970; return how many are new."""
    if not starts:
        return 0
    return connection.execute(_NOTE, {"jobs": list(starts), "times": list(starts.values())}).rowcount


def errors(connection: Connection) -> Errors | None:
    """Return how wrong the estimates were, None where none has been compared."""
    compared, median, p90 = connection.execute(_ERRORS).one()
    return Errors(compared, median, p90) if compared else None
