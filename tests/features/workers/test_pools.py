"""Concurrency: a worker's published capacity follows the size of its pool, and running jobs are not disturbed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from celery_capacity.routing.config.embedded import Pair
from tests.fixtures import tasks
from tests.fixtures.jobs.submitting import Submitter, standing_platform
from tests.fixtures.processes.platforms import Platform
from tests.fixtures.waiting import until

HOLD = "tests.fixtures.tasks.hold"


@pytest.fixture(scope="module")
def platform(server_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """Yield two workers: `fixed` with two processes, and `scaled` with one to three.

    Each job asks for the resource that has its worker's name.
    """
    with standing_platform(server_pair, tmp_path_factory.mktemp("pools")) as running:
        running.worker("fixed", cpus=8, slots=2, ready=False, PLATFORM_RESOURCES="fixed=100")
        running.worker("scaled", cpus=8, arguments=("--autoscale", "3,1"), PLATFORM_RESOURCES="scaled=100")
        running.processes[0].wait_for(" ready.")
        yield running


def slots(submitter: Submitter, worker: str) -> int:
    return int(submitter.view(worker)["slots"])


def control(submitter: Submitter, worker: str, command: str, **arguments: Any) -> Any:
    """Return the answer of one worker to a command of remote control."""
    app = submitter.app
    (name,) = [name for name in app.control.inspect(timeout=60, limit=2).ping() if name.startswith(f"{worker}@")]
    answers = app.control.broadcast(command, arguments, destination=[name], reply=True, timeout=60, limit=1)
    return answers[0][name]


def hold(submitter: Submitter, worker: str, jobs: int) -> list[str]:
    return [submitter.send(HOLD, worker, resources={worker: 1}) for _ in range(jobs)]


def running(submitter: Submitter, jobs: list[str]) -> int:
    return sum(submitter.row(job).state == "running" for job in jobs)


def test_a_pool_that_grows_and_shrinks_publishes_its_size(platform: Platform, submitter: Submitter) -> None:
    assert slots(submitter, "fixed") == 2
    jobs = hold(submitter, "fixed", 5)
    for _ in range(2):
        tasks.started(platform.redis, "fixed")
    assert "ok" in control(submitter, "fixed", "pool_grow", n=2)
    # New room is used at once.
    for _ in range(2):
        tasks.started(platform.redis, "fixed")
    until(lambda: slots(submitter, "fixed") == 4, "it publishes four")
    assert running(submitter, jobs) == 4
    # A pool that is busy in whole does not shrink. The published slots then stay unchanged.
    assert "error" in control(submitter, "fixed", "pool_shrink", n=1)
    assert slots(submitter, "fixed") == 4
    tasks.let_go(platform.redis, "fixed", 3)
    tasks.started(platform.redis, "fixed")
    until(lambda: running(submitter, jobs) == 2, "two are left")
    assert "ok" in control(submitter, "fixed", "pool_shrink", n=2)
    until(lambda: slots(submitter, "fixed") == 2, "it publishes two again")
    more = hold(submitter, "fixed", 1)
    submitter.until(more[0], "waiting")
    # Running jobs were not disturbed.
    tasks.let_go(platform.redis, "fixed", 3)
    rows = [submitter.ended(job) for job in [*jobs, *more]]
    assert [(row.state, row.attempt, row.losses) for row in rows] == [("succeeded", 1, 0)] * 6


def test_a_pool_that_scales_itself_publishes_its_largest_size(platform: Platform, submitter: Submitter) -> None:
    assert slots(submitter, "scaled") == 3
    jobs = hold(submitter, "scaled", 5)
    for _ in range(3):
        tasks.started(platform.redis, "scaled")
    assert running(submitter, jobs) == 3
    assert "ok" in control(submitter, "scaled", "autoscale", max=4, min=2)
    tasks.started(platform.redis, "scaled")
    until(lambda: slots(submitter, "scaled") == 4, "it publishes four")
    assert "error" in control(submitter, "scaled", "pool_grow", n=1)
    tasks.let_go(platform.redis, "scaled", 5)
    rows = [submitter.ended(job) for job in jobs]
    assert [(row.state, row.attempt) for row in rows] == [("succeeded", 1)] * 5
