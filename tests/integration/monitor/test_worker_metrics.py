"""A real worker serves its metrics at `PLATFORM_WORKER_METRICS`, from its start to its end."""

from __future__ import annotations

import re
from collections.abc import Iterator
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from celery_capacity.routing.config.embedded import Pair
from tests.fixtures import tasks
from tests.fixtures.jobs.submitting import Submitter, standing_platform
from tests.fixtures.processes.platforms import Platform, Process
from tests.fixtures.waiting import until

HOLD = "tests.fixtures.tasks.hold"


@pytest.fixture(scope="module")
def platform(server_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    with standing_platform(server_pair, tmp_path_factory.mktemp("metrics")) as running:
        yield running


@pytest.fixture(params=["prefork", "gevent"])
def worker(request: pytest.FixtureRequest, platform: Platform) -> Process:
    return platform.worker(f"a-{request.param}", 2, request.param, PLATFORM_WORKER_METRICS="127.0.0.1:0")


def test_scrape_of_a_worker_follows_its_jobs_until_its_end(
    worker: Process, platform: Platform, submitter: Submitter
) -> None:
    address = re.search(r"http://127\.0\.0\.1:\d+/metrics", worker.wait_for("metrics of this worker: "))
    assert address is not None

    def allocated() -> str:
        with urlopen(address[0], timeout=60) as answer:
            scraped: str = answer.read().decode()
        line = re.search(r'resource_allocated\{resource="cpus",worker="[a-z-]+"\} (\S+)', scraped)
        return "" if line is None else line[1]

    assert allocated() == "0.0"
    job = submitter.send(HOLD, worker.name, cpus=2)
    tasks.started(platform.redis, worker.name)
    assert allocated() == "2.0"
    tasks.let_go(platform.redis, worker.name)
    submitter.ended(job)
    until(lambda: allocated() == "0.0", "the worker has nothing allocated")
    assert worker.stop() == 0
    with pytest.raises(URLError):
        allocated()
