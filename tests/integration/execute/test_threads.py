"""Threads of a worker: how many live in it, and how many pass a job on to another one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import pytest

from celery_capacity.routing.config.embedded import Pair
from celery_capacity.routing.ledger import keys
from tests.features.workers.test_inspect import control
from tests.fixtures.processes import Platform
from tests.fixtures.servers import TENTH, empty_redis
from tests.fixtures.submitting import Submitter, platform_with_broker, standing_platform
from tests.fixtures.waiting import until

ADD: Final = "tests.fixtures.tasks.add"
#: Most threads that live in an idle worker, beside the main thread and those of the pool.
MAX_THREADS: Final = 6
#: Threads that the worker that runs the duties has besides.
THREADS_OF_RUNNER: Final = 2
#: Steps on the way of a job through a worker, from its message to its row.
WAY: Final = ("arrive", "settle", "execute_using_pool", "end", "settle", "write")
#: Most hand-offs between threads for one job.
MAX_HANDOFFS: Final = 4
#: Seconds until the threads that were started on demand have ended.
IDLE_WITHIN: Final = 40.0


@pytest.fixture(scope="module")
def platform(server_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """Yield a platform with a worker that runs the duties, and another one."""
    with standing_platform(server_pair, tmp_path_factory.mktemp("threads"), "tests.tasks.counted") as running:
        running.worker("runner", 1, PLATFORM_RESOURCES="runner=1")
        until(lambda: running.redis.hget(keys.RUNNER, "fence"), "it runs the duties")
        running.worker("other", 4, slots=2, PLATFORM_RESOURCES="other=10")
        yield running


def assert_few_threads(submitter: Submitter, worker: str, most: int) -> None:
    last: dict[str, Any] = {}

    def are_few() -> bool:
        last.update(control(submitter, worker, "threads"))
        return bool(last["count"] <= most)

    until(are_few, lambda: f"at most {most} threads live in {worker}: {last}", IDLE_WITHIN)


def test_few_threads_live_in_an_idle_worker(platform: Platform, submitter: Submitter) -> None:
    for _ in range(3):
        submitter.ended(submitter.send(ADD, 1, 2, cpus=1, resources={"other": 1}))
        submitter.ended(submitter.send(ADD, 1, 2, cpus=1, resources={"runner": 1}))
    assert_few_threads(submitter, "other", MAX_THREADS)
    assert_few_threads(submitter, "runner", MAX_THREADS + THREADS_OF_RUNNER)


def test_few_threads_pass_a_job_on(platform: Platform, submitter: Submitter) -> None:
    job = submitter.send(ADD, 1, 2, cpus=1, resources={"other": 1})
    assert submitter.value(job) == 3
    submitter.ended(job)
    steps = control(submitter, "other", "steps", job=job)
    assert "add" in {step for step, _ in steps}, steps
    # The start is noted beside the body, so only the way of the job itself has an order.
    left = iter(steps)
    names = [next(thread for step, thread in left if step == wanted) for wanted in WAY]
    handoffs = sum(before != after for before, after in pairwise(names))
    assert handoffs <= MAX_HANDOFFS, steps


def test_few_threads_live_beside_another_broker(server_pair: Pair, tmp_path: Path) -> None:
    """A thread of its own takes the messages of jobs from the ledger's Redis."""
    with (
        empty_redis(server_pair) as broker_url,
        platform_with_broker(server_pair, tmp_path, broker_url) as running,
        closing(Submitter(running)) as submitter,
    ):
        # At a tenth of the usual intervals Postgres is called so often that its watchdog never ends.
        running.environment = {name: value for name, value in running.environment.items() if name not in TENTH}
        running.environment["PLATFORM_IMPORTS"] += ",tests.tasks.counted"
        running.worker("runner", 1)
        until(lambda: running.redis.hget(keys.RUNNER, "fence"), "it runs the duties")
        running.worker("apart", 4, PLATFORM_RESOURCES="apart=1")
        submitter.ended(submitter.send(ADD, 1, 2, cpus=1, resources={"apart": 1}))
        assert_few_threads(submitter, "apart", MAX_THREADS)
        assert "mailbox" in control(submitter, "apart", "threads")["names"]
