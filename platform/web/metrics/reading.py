"""Reading for a scrape: the overview, and what only Postgres counts, in a constant number of statements.

A store that does not answer leaves its numbers out. A metric that is missing is honest; an old one, or a zero, is not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import redis
from redis.exceptions import RedisError
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from celery_capacity.platform.web.metrics.ended_jobs import EndedJobs
from celery_capacity.routing.database.authority import Authority, read_authority
from celery_capacity.routing.errors import PlatformError
from celery_capacity.routing.inspect.overview import Overview
from celery_capacity.routing.model.states import FINAL, State

#: Jobs that are counted in each state. More show as this number: counting takes Postgres some 0.1 s for a million.
MAX_COUNTED: Final = 1_000_000

#: States that are counted anew in each reading.
OPEN: Final = tuple(state for state in State if state not in FINAL)

_OPEN: Final = text("""
SELECT s.state, counted.jobs FROM unnest(CAST(:states AS text[])) AS s (state) CROSS JOIN LATERAL (
  SELECT count(*) AS jobs FROM (SELECT FROM jobs WHERE jobs.state = s.state LIMIT :most) AS rows_of_state
) AS counted
""")


@dataclass(frozen=True, slots=True)
class Reading:
    """Values that a scrape serves. None stands for what a store that does not answer would have said."""

    overview: Overview | None
    redis_up: bool
    authority: Authority | None
    open_jobs: Mapping[str, int] | None
    ended: EndedJobs

    @property
    def postgres_up(self) -> bool:
        return self.authority is not None


def read(overview: Callable[[], Overview], client: redis.Redis, engine: Engine, ended: EndedJobs) -> Reading:
    """Read what a scrape serves. `ended` goes on counting. Raises nothing for a store that does not answer."""
    try:
        seen = overview()
    except PlatformError:
        seen = None
    open_jobs = authority = None
    try:
        with engine.connect() as connection:
            open_jobs = _open_jobs(connection)
            ended.read(connection, (seen.unapplied_age or 0.0) if seen is not None else 0.0)
            authority = read_authority(connection)
    except (OperationalError, InterfaceError, PoolTimeout, PlatformError):
        open_jobs = authority = None
    return Reading(seen, _answers(client), authority, open_jobs, ended)


def _open_jobs(connection: Connection) -> dict[str, int]:
    rows = connection.execute(_OPEN, {"states": [state.value for state in OPEN], "most": MAX_COUNTED})
    return {row.state: row.jobs for row in rows}


def _answers(client: redis.Redis) -> bool:
    try:
        client.ping()
    except RedisError:
        return False
    return True
