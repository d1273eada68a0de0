"""A platform whose Redis has reached its `maxmemory`, and has room again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from celery_capacity.platform.embedded import servers
from celery_capacity.routing.config.embedded import Pair
from tests.fixtures.jobs.submitting import Submitter, standing_platform
from tests.fixtures.processes.platforms import READY, Platform
from tests.fixtures.waiting import until
from tests.tasks.work import read, starts

WORK = "tests.tasks.work.work"


@pytest.fixture
def own_pair() -> Iterator[Pair]:
    """Yield servers of the test's own, whose Redis is going to be full."""
    with servers.private_pair(durable=False) as pair:
        yield pair


@pytest.fixture
def platform(own_pair: Pair, tmp_path: Path) -> Iterator[Platform]:
    with standing_platform(own_pair, tmp_path, "tests.tasks.work") as running:
        yield running


def states(platform: Platform) -> dict[str, int]:
    with platform.engine.connect() as connection:
        rows = connection.execute(text("SELECT state, count(*) FROM jobs GROUP BY state"))
        return {row[0]: row[1] for row in rows}


def test_full_redis_ends_what_it_has_and_goes_on_when_it_has_room(
    platform: Platform, submitter: Submitter, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    worker = platform.worker("a", cpus=2)
    jobs = [submitter.send(WORK, str(trace), str(n), 0.7, 1000) for n in range(6)]
    until(lambda: starts(read(trace)).total() >= 2, "two have begun")
    platform.redis.config_set("maxmemory", 1)
    # The jobs are durable, and their submitter notices nothing.
    later = [submitter.send(WORK, str(trace), str(n), 0.0, 1000) for n in range(6, 9)]
    assert [submitter.ended(job).state for job in jobs] == ["succeeded"] * 6
    assert [submitter.value(job) for job in jobs] == [str(n) for n in range(6)]
    until(lambda: submitter.allocated_cpus() == "0", "all that they held is free")
    # The sweep tries, and the worker goes on.
    worker.wait_for("wait until Redis has room")
    # Celery's own connection to a full broker succeeds when the broker has room.
    other = platform.worker("b", cpus=2, ready=False)
    other.wait_for("Trying to reconnect")
    assert states(platform) == {"succeeded": 6, "accepted": 3}
    platform.redis.config_set("maxmemory", 0)
    assert [submitter.ended(job).state for job in later] == ["succeeded"] * 3
    assert starts(read(trace)) == {str(n): 1 for n in range(9)}
    other.wait_for(READY)
    assert worker.alive
