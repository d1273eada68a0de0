"""Counts of ended jobs: how many, how long they waited, how long they ran. Each reading adds those that ended since.

A reading reads at most `MAX_ROWS` rows by the index of ends, and begins where the last one stopped. So its cost does
not grow with the number of jobs, and a job counts once. The counts begin with the first reading of a process, as those
of any process do in Prometheus.

A worker tells Postgres of an end some time after it. So a reading stops before the oldest transition that Postgres does
not have yet, and `SETTLED` seconds before now.
"""

from __future__ import annotations

from collections import Counter
from datetime import datetime
from typing import Any, Final

from sqlalchemy import Connection, text

from celery_capacity.routing.model.states import FINAL
from celery_capacity.workers.supervision.exposition import Histogram
from celery_capacity.workers.supervision.metric_names import BUCKETS, MAX_TASKS, OTHER, label_of

#: Rows of a reading: Postgres reads them in some 0.1 s.
MAX_ROWS: Final = 50_000
#: Seconds after which the row of an end is there, unless the ledger has an older transition that Postgres lacks.
SETTLED: Final = 5.0

_BEGIN: Final = text("SELECT clock_timestamp() - make_interval(secs => :age)")

# A job that never started has no run time, and a job that was never admitted no wait.
_ENDED: Final = text("""
WITH ended AS (
  SELECT seq, name, state, finished_at,
    CASE WHEN state IN ('succeeded', 'failed')
      THEN greatest(extract(epoch FROM finished_at - started_at)::float8, 0) END AS ran,
    CASE WHEN admitted_at IS NOT NULL
      THEN greatest(extract(epoch FROM admitted_at - greatest(submitted_at, due_at))::float8, 0) END AS waited
  FROM jobs
  WHERE finished_at >= :at AND (finished_at, seq) > (:at, :seq)
    AND finished_at <= clock_timestamp() - make_interval(secs => :age)
  ORDER BY finished_at, seq LIMIT :most
)
SELECT name, state, width_bucket(ran, CAST(:bounds AS float8[])) AS ran_in,
  width_bucket(waited, CAST(:bounds AS float8[])) AS waited_in,
  count(*) AS jobs, coalesce(sum(ran), 0) AS ran, coalesce(sum(waited), 0) AS waited,
  max(finished_at) AS at, (array_agg(seq ORDER BY finished_at DESC, seq DESC))[1] AS seq
FROM ended GROUP BY name, state, ran_in, waited_in
""")


class EndedJobs:
    """Counts since the first reading. Not thread-safe."""

    def __init__(self) -> None:
        self.states: Counter[str] = Counter({state.value: 0 for state in FINAL})
        self.waits = Histogram()
        self.runs: dict[str, Histogram] = {}
        self._at: datetime | None = None
        self._seq = 0

    def read(self, connection: Connection, unapplied_age: float = 0.0, settled: float = SETTLED) -> None:
        """Add the jobs that ended since the last reading. `unapplied_age`: of the oldest transition Postgres lacks."""
        age = settled + unapplied_age
        if self._at is None:
            self._at = connection.execute(_BEGIN, {"age": age}).scalar_one()
            return
        since = {"at": self._at, "seq": self._seq, "age": age, "most": MAX_ROWS, "bounds": list(BUCKETS)}
        for row in connection.execute(_ENDED, since).all():
            self._add(row)

    def _add(self, row: Any) -> None:
        self.states[row.state] += row.jobs
        if row.waited_in is not None:
            self.waits.add(row.waited_in, row.jobs, row.waited)
        if row.ran_in is not None:
            self._histogram(label_of(row.name)).add(row.ran_in, row.jobs, row.ran)
        assert self._at is not None
        self._at, self._seq = max((self._at, self._seq), (row.at, row.seq))

    def _histogram(self, task: str) -> Histogram:
        if task not in self.runs and len(self.runs) >= MAX_TASKS:
            task = OTHER
        return self.runs.setdefault(task, Histogram())
