"""A real worker serves its metrics at `PLATFORM_WORKER_METRICS`, from its start to its end."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families

from celery_capacity.routing.config.embedded import Pair
from tests.fixtures import tasks
from tests.fixtures.jobs.submitting import Submitter, standing_platform
from tests.fixtures.processes.platforms import Platform, Process
from tests.fixtures.waiting import until

#: Seconds by which a job is put off. They are no wait.
PUT_OFF = 3
HOLD, ADD, FAIL = (f"tests.fixtures.tasks.{name}" for name in ("hold", "add", "fail"))


def address_of(worker: Process) -> str:
    address = re.search(r"http://127\.0\.0\.1:\d+/metrics", worker.wait_for("metrics of this worker: "))
    assert address is not None
    return address[0]


def scraped(address: str) -> dict[tuple[str, ...], float]:
    """Return the samples that a worker serves, by their names and the values of their labels."""
    with urlopen(address, timeout=60) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    return {(it.name, *it.labels.values()): it.value for family in families for it in family.samples}


@pytest.fixture(scope="module")
def platform(server_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    with standing_platform(server_pair, tmp_path_factory.mktemp("metrics")) as running:
        yield running


@pytest.fixture(params=["prefork", "threads", "gevent"])
def worker(request: pytest.FixtureRequest, platform: Platform) -> Iterator[Process]:
    worker = platform.worker(f"a-{request.param}", 2, request.param, PLATFORM_WORKER_METRICS="127.0.0.1:0")
    yield worker
    if worker.alive:
        worker.stop()


def test_scrape_of_a_worker_follows_its_jobs_until_its_end(
    worker: Process, platform: Platform, submitter: Submitter
) -> None:
    address = address_of(worker)

    def allocated() -> float | None:
        return scraped(address).get(("platform_resource_allocated", "cpus", worker.name))

    assert allocated() == 0
    job = submitter.send(HOLD, worker.name, cpus=2)
    tasks.started(platform.redis, worker.name)
    assert allocated() == 2
    tasks.let_go(platform.redis, worker.name)
    submitter.ended(job)
    until(lambda: allocated() == 0, "the worker has nothing allocated")
    assert worker.stop() == 0
    with pytest.raises(URLError):
        allocated()


def test_worker_counts_how_long_its_jobs_waited_and_ran(
    worker: Process, platform: Platform, submitter: Submitter
) -> None:
    address, asked = address_of(worker), time.monotonic()
    jobs = [submitter.send(HOLD, worker.name, cpus=2)]
    tasks.started(platform.redis, worker.name)
    began = time.monotonic()
    # The second job waits for the first one, and comes with its release. The third one was put off.
    jobs.append(submitter.send(HOLD, worker.name, cpus=2))
    jobs.append(submitter.send(ADD, 1, 2, countdown=PUT_OFF))
    held = time.monotonic()
    assert ("platform_worker_run_seconds_count", HOLD, worker.name) not in scraped(address)
    tasks.let_go(platform.redis, worker.name, 2)
    for job in jobs:
        submitter.ended(job)
    within = time.monotonic() - asked

    def counts() -> list[float | None]:
        samples = scraped(address)
        runs = [samples.get(("platform_worker_run_seconds_count", task, worker.name)) for task in (HOLD, ADD)]
        return [*runs, samples["platform_worker_wait_seconds_count", worker.name]]

    until(lambda: counts() == [2, 1, 3], counts)
    samples = scraped(address)
    assert held - began < samples["platform_worker_run_seconds_sum", HOLD, worker.name] < within
    waited = [
        row.admitted_at - max(row.submitted_at, row.due_at or row.submitted_at) for row in map(submitter.row, jobs)
    ]
    expected = sum(wait.total_seconds() for wait in waited)
    # The sender reads the time of a submission a moment before Postgres does, or after it.
    assert samples["platform_worker_wait_seconds_sum", worker.name] == pytest.approx(expected, abs=PUT_OFF / 2)


def test_job_that_fails_has_a_run_time_and_one_that_is_cancelled_has_none(
    worker: Process, platform: Platform, submitter: Submitter
) -> None:
    address = address_of(worker)
    submitter.ended(submitter.send(FAIL, "as told"))
    held = submitter.send(HOLD, worker.name, cpus=2)
    tasks.started(platform.redis, worker.name)
    waits = submitter.send(ADD, 1, 2, cpus=2)
    submitter.app.control.revoke(waits)
    submitter.ended(waits)
    tasks.let_go(platform.redis, worker.name)
    submitter.ended(held)
    until(lambda: scraped(address).get(("platform_worker_run_seconds_count", HOLD, worker.name)) == 1, "it is counted")
    samples = scraped(address)
    tasks_with_times = {labels[0] for name, *labels in samples if name == "platform_worker_run_seconds_count"}
    assert tasks_with_times == {HOLD, FAIL}
    assert samples["platform_worker_wait_seconds_count", worker.name] == 2
