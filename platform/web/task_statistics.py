"""Figures of each task over its newest jobs.

They tell how many there are, how many failed, what they ask for, how long they waited and ran, and the trend of that.
"""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import Connection, text

from celery_capacity.routing.database.job_conditions import like_pattern
from celery_capacity.routing.model.amounts import MILLICORES, cpus_number
from celery_capacity.routing.model.states import State

#: Newest jobs that are counted: Postgres reads them in some 50 ms.
SAMPLE: Final = 20_000
#: Tasks that are listed, those with the most jobs.
MAX_TASKS: Final = 500
#: Parts of the trend of a task. Each has as many of the jobs that ran.
PARTS: Final = 12

# The newest jobs of each state come from the index of states. A failed job counts as ended, whether or not it started.
_FIGURES: Final = text(f"""
WITH sample AS MATERIALIZED (
  SELECT newest.* FROM unnest(CAST(:states AS text[])) AS s (state) CROSS JOIN LATERAL (
    SELECT seq, name, jobs.state, request, submitted_at, due_at, admitted_at, started_at, finished_at
    FROM jobs WHERE jobs.state = s.state ORDER BY seq DESC LIMIT :sample
  ) AS newest ORDER BY seq DESC LIMIT :sample
), spans AS (
  SELECT *,
    CASE WHEN state NOT IN ('accepted', 'waiting', 'scheduled')
      THEN extract(epoch FROM admitted_at - greatest(submitted_at, due_at))::float END AS waited,
    CASE WHEN state IN ('succeeded', 'failed') THEN extract(epoch FROM finished_at - started_at)::float END AS ran
  FROM sample
), parts AS (
  SELECT name, part, percentile_cont(0.5) WITHIN GROUP (ORDER BY ran) AS middle FROM (
    SELECT name, greatest(ran, 0) AS ran, ntile({PARTS}) OVER (PARTITION BY name ORDER BY finished_at) AS part
    FROM spans WHERE ran IS NOT NULL
  ) AS ended GROUP BY name, part
), trends AS (
  SELECT name, array_agg(middle ORDER BY part) AS trend FROM parts GROUP BY name
), asked AS (
  SELECT name, min(cpus) AS least_cpus, max(cpus) AS most_cpus, min(memory) AS least_memory, max(memory) AS most_memory
  FROM (
    SELECT name, coalesce((request ->> 'cpus')::numeric, 0) AS cpus,
      coalesce((request ->> 'memory')::numeric, 0) AS memory
    FROM (SELECT DISTINCT name, request FROM sample) AS requests
  ) AS amounts GROUP BY name
)
SELECT figures.*, least_cpus, most_cpus, least_memory, most_memory, trend FROM (
SELECT name, count(*) AS jobs,
  count(*) FILTER (WHERE state IN ('accepted', 'waiting', 'scheduled')) AS waiting,
  count(*) FILTER (WHERE state IN ('admitted', 'running')) AS running,
  count(*) FILTER (WHERE state = 'succeeded') AS succeeded,
  count(*) FILTER (WHERE state IN ('failed', 'lost')) AS failed,
  percentile_cont(ARRAY[0.5, 0.95]) WITHIN GROUP (ORDER BY greatest(waited, 0)) FILTER (WHERE waited IS NOT NULL)
    AS waits,
  percentile_cont(ARRAY[0.5, 0.95]) WITHIN GROUP (ORDER BY greatest(ran, 0)) FILTER (WHERE ran IS NOT NULL) AS runs
FROM spans WHERE CAST(:name AS text) IS NULL OR name LIKE :name
GROUP BY name ORDER BY count(*) DESC, name LIMIT :most
) AS figures JOIN asked USING (name) LEFT JOIN trends USING (name) ORDER BY jobs DESC, name
""")


def read(connection: Connection, task: str | None = None) -> dict[str, Any]:
    """Return the figures of each task, the one with the most jobs first. Times in seconds, null where none is known.

    `task`: only tasks of this name, in which `*` stands for any text.
    """
    states, name = [state.value for state in State], None if task is None else like_pattern(task)
    values = {"states": states, "sample": SAMPLE, "most": MAX_TASKS, "name": name}
    rows = connection.execute(_FIGURES, values).all()
    return {"tasks": [_figures(row) for row in rows], "sample": sum(row.jobs for row in rows), "limit": SAMPLE}


def _figures(row: Any) -> dict[str, Any]:
    ended = row.succeeded + row.failed
    return {
        "name": row.name,
        "jobs": row.jobs,
        "waiting": row.waiting,
        "running": row.running,
        "succeeded": row.succeeded,
        "failed": row.failed,
        "failure_percent": round(100 * row.failed / ended, 2) if ended else None,
        **_percentiles("wait", row.waits),
        **_percentiles("run", row.runs),
        "run_trend_seconds": [round(middle, 3) for middle in row.trend or ()],
        "cpus_least": cpus_number(round(row.least_cpus * MILLICORES)),
        "cpus_most": cpus_number(round(row.most_cpus * MILLICORES)),
        "memory_least": int(row.least_memory),
        "memory_most": int(row.most_memory),
    }


def _percentiles(name: str, values: list[float | None] | None) -> dict[str, float | None]:
    middle, high = values or (None, None)
    return {
        f"{name}_p50_seconds": None if middle is None else round(middle, 3),
        f"{name}_p95_seconds": None if high is None else round(high, 3),
    }
