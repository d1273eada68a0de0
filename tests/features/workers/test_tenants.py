"""Tenants with workers: two equal tenants get the same CPU-seconds."""

from __future__ import annotations

from typing import Final

from sqlalchemy import text

from celery_capacity.platform.tasks import SLEEP
from tests.fixtures.jobs.submitting import Submitter
from tests.fixtures.processes.platforms import Platform

#: Jobs of each tenant, and the seconds that each runs.
TENANTS: Final = ("physics", "biology")
JOBS: Final = 300
RUN: Final = 0.02
#: Largest difference between the CPU-seconds of both tenants, as a part of their mean.
DIFFERENCE: Final = 0.05

# Both tenants have jobs that run and jobs that wait from the first start of the later one until the last start of the
# first that is done. Of each run the part in that time counts.
_CPU_SECONDS: Final = text("""
WITH runs AS (
  SELECT substring(shape FROM ',\\$([^,]+)') AS tenant, a.started_at, a.ended_at
  FROM attempts a JOIN jobs j ON j.id = a.job_id
), saturated AS (
  SELECT max(first) AS since, min(last) AS until
  FROM (SELECT min(started_at) AS first, max(started_at) AS last FROM runs GROUP BY tenant) AS x
)
SELECT tenant, sum(extract(epoch FROM least(ended_at, until) - greatest(started_at, since)))::float8 AS seconds
FROM runs, saturated WHERE started_at < until AND ended_at > since GROUP BY tenant
""")


def test_equal_tenants_get_equal_cpu_seconds_under_saturation(platform: Platform, submitter: Submitter) -> None:
    # All jobs wait before the first starts, and those of one tenant before those of the other.
    jobs = [
        submitter.send(SLEEP, RUN, cpus=1, tenant=tenant, ignore_result=True) for tenant in TENANTS for _ in range(JOBS)
    ]
    platform.worker("a", cpus=4, pool="threads")
    assert {submitter.ended(job).state for job in jobs} == {"succeeded"}
    with platform.engine.connect() as connection:
        used = {row.tenant: row.seconds for row in connection.execute(_CPU_SECONDS)}
    assert used.keys() == set(TENANTS)
    mean = sum(used.values()) / len(used)
    assert max(used.values()) - min(used.values()) <= DIFFERENCE * mean, used
