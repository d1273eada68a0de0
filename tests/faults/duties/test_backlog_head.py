"""More jobs wait than Redis holds: workers run all of them in their order, and the runner fetches them in time."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from sqlalchemy import text

from celery_capacity.routing.config.embedded import Pair
from celery_capacity.routing.ledger import keys
from tests.fixtures.jobs.submitting import Submitter, platform_on
from tests.fixtures.processes.platforms import Platform
from tests.fixtures.servers.pair import empty_database, empty_redis, environment_of
from tests.fixtures.waiting import until

ADD: Final = "tests.fixtures.tasks.add"
#: Several times as many as Redis holds of one request.
JOBS: Final = 150


@pytest.fixture
def platform(server_pair: Pair, tmp_path: Path) -> Iterator[Platform]:
    with empty_database(server_pair) as database_url, empty_redis(server_pair) as redis_url:
        environment = environment_of(redis_url, database_url, tmp_path) | {"PLATFORM_MAX_LEDGER_BACKLOG": "1"}
        with platform_on(environment, tmp_path) as running:
            yield running


def ended(platform: Platform) -> list[Any]:
    with platform.engine.connect() as connection:
        return list(
            connection.execute(text("SELECT id, state FROM jobs WHERE state = 'succeeded' ORDER BY started_at"))
        )


def noted(platform: Platform, key: str, field: str) -> int:
    value: Any = platform.redis.hget(key, field)
    return int(value or 0)


def test_all_jobs_run_in_their_order(platform: Platform, submitter: Submitter) -> None:
    jobs = [submitter.send(ADD, number, 1) for number in range(JOBS)]
    assert noted(platform, keys.EPOCH, "waiting") < JOBS / 2
    platform.worker("a", cpus=1)
    until(lambda: len(ended(platform)) == JOBS, "all jobs end")
    assert [row.id for row in ended(platform)] == jobs
    assert noted(platform, keys.COUNTERS, "left") >= JOBS / 2
    assert platform.redis.exists(keys.BORDER, keys.LOW, keys.STAYING) == 0


def test_successor_of_a_dead_runner_goes_on(platform: Platform, submitter: Submitter) -> None:
    jobs = [submitter.send(ADD, number, 1) for number in range(2 * JOBS)]
    first = platform.worker("a", cpus=1)
    until(lambda: len(ended(platform)) >= JOBS / 3, "some jobs end")
    os.kill(first.pid, signal.SIGKILL)
    platform.worker("b", cpus=1)
    until(lambda: len(ended(platform)) == len(jobs), "all jobs end")
    assert platform.redis.exists(keys.BORDER, keys.LOW, keys.STAYING) == 0
