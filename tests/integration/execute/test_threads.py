"""Threads of a worker: how many live in it, and how many pass a job on to another one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import pytest

from celery_capacity.routing.config.embedded import Pair
from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.ledger import keys
from tests.features.workers.test_inspect import control
from tests.fixtures.jobs.submitting import Submitter, platform_with_broker, standing_platform
from tests.fixtures.processes.platforms import Platform
from tests.fixtures.servers.pair import TENTH, empty_redis
from tests.fixtures.waiting import until

ADD: Final = "tests.fixtures.tasks.add"
#: Most threads that live in an idle worker, beside the main thread and those of the pool.
MAX_THREADS: Final = 6
#: Threads that the worker that runs the duties has besides.
THREADS_OF_RUNNER: Final = 2
#: Steps of a job in an idle worker, from its message to its row, and the most hand-offs between threads.
WAY: Final = ("arrive", "prepare_settle", "execute_using_pool", "end", "prepare_settle", "write")
MAX_HANDOFFS: Final = 4
#: Steps of a job that a full worker takes from a reply, and the most hand-offs.
FULL_WAY: Final = ("execute_using_pool", "end", "prepare_settle", "write")
MAX_FULL_HANDOFFS: Final = 1
#: Jobs that keep a worker full for a moment.
MANY: Final = 20
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
    assert handoffs(steps, WAY) <= MAX_HANDOFFS, steps


def test_main_loop_alone_passes_a_job_on_in_a_full_worker(platform: Platform, submitter: Submitter) -> None:
    """The ledger thread settles first. It then gives the main loop a connection of its own."""
    seen: list[Any] = []

    def are_few() -> bool:
        jobs = [submitter.send(ADD, 1, 2, cpus=1, resources={"other": 10}) for _ in range(MANY)]
        for job in jobs:
            submitter.ended(job)
        seen[:] = [control(submitter, "other", "steps", job=job) for job in jobs]
        # A heartbeat may have its turn at the end of a job.
        return sum(handoffs(steps, FULL_WAY) <= MAX_FULL_HANDOFFS for steps in seen) > MANY / 2

    until(are_few, lambda: f"the main loop alone passes jobs on: {seen}", IDLE_WITHIN)


def handoffs(steps: list[tuple[str, str]], way: Sequence[str]) -> int:
    # The start is noted beside the body, so only the way of the job itself has an order.
    left = iter(steps)
    names = [next(thread for step, thread in left if step == wanted) for wanted in way]
    return sum(before != after for before, after in pairwise(names))


def test_few_threads_pass_on_a_job_whose_result_another_backend_keeps(server_pair: Pair, tmp_path: Path) -> None:
    """The thread that brings the result writes the outcome, too."""
    with (
        empty_redis(server_pair) as results_url,
        standing_platform(server_pair, tmp_path, "tests.tasks.counted") as running,
    ):
        running.environment["CELERY_RESULT_BACKEND"] = results_url
        named = {name: value for name, value in running.environment.items() if not name.startswith("PYTHON")}
        running.settings = Settings.from_environ(named)
        with closing(Submitter(running)) as submitter:
            running.worker("a", 4)
            job = submitter.send(ADD, 1, 2, cpus=1)
            assert submitter.value(job) == 3
            submitter.ended(job)
            steps = control(submitter, "a", "steps", job=job)
            # The start is written beside the body, by the recorder, and perhaps later than the end.
            assert ["write", "delivery"] in steps, steps
            assert handoffs(steps, WAY) <= MAX_HANDOFFS, steps


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
        assert "ledger-queue" in control(submitter, "apart", "threads")["names"]
