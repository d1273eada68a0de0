"""A wide job starts though narrow ones keep coming, while Redis is away and Postgres decides."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import text

from celery_capacity.platform.tasks import SLEEP
from tests.faults.breaking.servers import Servers
from tests.faults.stores.test_without_redis import until_decides
from tests.features.workers.test_wide_jobs import NARROW, QUICK, Stream
from tests.fixtures.jobs.submitting import Submitter
from tests.fixtures.processes.platforms import Platform
from tests.fixtures.waiting import until

pytestmark = pytest.mark.long


class Staggered(Stream):
    """A stream whose narrow jobs seldom end together, so that a worker of four CPUs is never empty by chance."""

    def __init__(self, submitter: Submitter, expected: object) -> None:
        self._submitter = submitter
        options = {} if expected is None else {"expected": expected}
        self.narrow = [self._run(number, 1, options) for number in range(8)]
        self.wide = self._run(0, 4, options)
        self.narrow += [self._run(number, 1, options) for number in range(NARROW)]

    def _run(self, number: int, cpus: int, options: dict[str, Any]) -> str:
        seconds = 0.2 + 0.07 * (number % 5)
        return self._submitter.send(SLEEP, seconds, cpus=cpus, ignore_result=True, **options)


def reserved(platform: Platform) -> list[str]:
    with platform.engine.connect() as connection:
        return list(connection.execute(text("SELECT worker FROM reservations")).scalars())


@pytest.fixture
def back(servers: Servers, platform: Platform) -> Iterator[None]:
    """Bring Redis back at the end of the test."""
    yield
    if servers.redis_is_away():
        servers.start_redis()
        until_decides(platform, "ledger")


@pytest.mark.parametrize("expected", [None, 0.01, "1d"], ids=["unknown", "too-short", "too-long"])
@pytest.mark.usefixtures("back")
def test_wide_job_starts_under_a_stream_without_redis(
    servers: Servers, platform: Platform, submitter: Submitter, expected: object
) -> None:
    platform.worker("a", cpus=4, pool="threads", PLATFORM_RESERVE_AFTER=QUICK)
    servers.kill_redis()
    until_decides(platform, "postgres")
    stream = Staggered(submitter, expected)
    assert stream.passed() < len(stream.narrow)
    servers.start_redis()
    until_decides(platform, "ledger")
    stream.cancel()


@pytest.mark.usefixtures("back")
def test_wide_job_starts_without_redis_though_its_reserved_worker_died(
    servers: Servers, platform: Platform, submitter: Submitter
) -> None:
    workers = {name: platform.worker(name, cpus=2, pool="threads", PLATFORM_RESERVE_AFTER=QUICK) for name in ("a", "b")}
    servers.kill_redis()
    until_decides(platform, "postgres")
    stream = Stream(submitter, 4, "1d")
    (name,) = until(lambda: reserved(platform), "a worker is reserved")
    workers[name].kill()
    assert stream.passed() < len(stream.narrow)
    servers.start_redis()
    until_decides(platform, "ledger")
    stream.cancel()
