"""Concurrency: how each pool of Celery's runs jobs, and replaces its processes by new ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from celery_capacity.routing.config.embedded import Pair
from celery_capacity.routing.errors import Unsupported
from celery_capacity.workers.execute.gevent_pool import check_pool
from celery_capacity.workers.process.exit_codes import Exit
from tests.fixtures import tasks
from tests.fixtures.jobs.submitting import Submitter, standing_platform
from tests.fixtures.processes.platforms import Platform, Process
from tests.fixtures.waiting import until
from tests.tasks import bodies


@pytest.fixture(scope="module")
def platform(server_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """Yield three workers: `counted`, `weighed` and `single`.

    Each job asks for the resource that has its worker's name. Each process of `counted` runs two jobs. The
    processes of `weighed` always have too much memory. `single` has no process but its own.
    """
    with standing_platform(server_pair, tmp_path_factory.mktemp("pools"), "tests.tasks.bodies") as running:
        for name, pool, arguments in (
            ("counted", "prefork", ("--max-tasks-per-child", "2")),
            # The limit is in KiB.
            ("weighed", "prefork", ("worker.max_memory_per_child=1000",)),
            ("single", "solo", ()),
        ):
            running.worker(
                *(name, 2, pool),  # type: ignore[arg-type]
                arguments=arguments,
                ready=False,
                PLATFORM_RESOURCES=f"{name}=100",
            )
        for process in running.processes:
            process.wait_for(" ready.")
        yield running


def worker(platform: Platform, name: str) -> Process:
    (only,) = [process for process in platform.processes if process.name == name]
    return only


@pytest.mark.parametrize(("name", "most"), [("counted", 2), ("weighed", 1)])
def test_processes_that_are_replaced_lose_nothing(
    platform: Platform, submitter: Submitter, name: str, most: int
) -> None:
    sent = [bodies.process.apply_async(cpus=0.5, resources={name: 1}) for _ in range(10)]
    ran = [result.get(timeout=60) for result in sent]
    assert max(ran.count(pid) for pid in ran) <= most
    assert worker(platform, name).pid not in ran
    rows = [submitter.ended(result.id) for result in sent]
    assert [(row.state, row.attempt, row.losses) for row in rows] == [("succeeded", 1, 0)] * 10
    # The size of the pool is unchanged.
    assert submitter.view(name)["slots"] == "2"


def test_a_solo_pool_runs_one_job_at_a_time_in_the_worker_itself(platform: Platform, submitter: Submitter) -> None:
    assert submitter.view("single")["slots"] == "1"
    held = submitter.send("tests.fixtures.tasks.hold", "single", resources={"single": 1}, cpus=0.5)
    assert tasks.started(platform.redis, "single") == (held, worker(platform, "single").pid)
    after = [bodies.process.apply_async(cpus=0.5, resources={"single": 1}) for _ in range(3)]
    for result in after:
        submitter.until(result.id, "waiting")
    tasks.let_go(platform.redis, "single")
    assert {result.get(timeout=60) for result in after} == {worker(platform, "single").pid}
    assert submitter.value(held) == "single"
    until(lambda: submitter.allocated_cpus() == "0", "all is released")


#: Variable in which Celery takes a pool that it has no name for.
CUSTOM = "CELERY_CUSTOM_WORKER_POOL"


@pytest.mark.parametrize(
    ("module", "says", "advice"),
    [
        ("eventlet", "the pool celery.concurrency.eventlet:TaskPool is not supported", "-P gevent"),
        ("gevent", "the pool celery.concurrency.gevent:TaskPool was not named early enough", "worker -P gevent"),
    ],
)
def test_a_pool_that_would_stop_the_heartbeat_is_refused_with_what_to_do(
    platform: Platform, module: str, says: str, advice: str
) -> None:
    named: dict[str, Any] = {CUSTOM: f"celery.concurrency.{module}:TaskPool"}
    done = platform.celery("worker", "-P", "custom", **named, NODE_NAME="green")
    assert done.returncode == Exit.CONFIGURATION
    assert says in done.stderr
    assert advice in done.stderr
    assert "Traceback" not in done.stderr


def test_every_other_pool_is_taken_by_name() -> None:
    for pool in ("prefork", "processes", "threads", "solo"):
        assert not check_pool(pool)
    for pool in ("eventlet", "gevent"):
        with pytest.raises(Unsupported, match=pool):
            check_pool(pool)
