"""A wide job starts though narrow ones keep coming: with unknown and wrong run times, after a death, after a loss."""

from __future__ import annotations

from typing import Any, Final

import pytest
from sqlalchemy import text

from celery_capacity.platform.tasks import SLEEP
from celery_capacity.routing.ledger import keys
from tests.fixtures.jobs.submitting import Submitter
from tests.fixtures.processes.platforms import Platform
from tests.fixtures.waiting import until

#: Seconds that a narrow job runs, and the number of narrow jobs. On two CPUs they would pass the wide one for 8 s.
RUN: Final = 0.2
NARROW: Final = 80
#: Seconds after which a worker is kept for a blocked job.
QUICK: Final = "0.1"


class Stream:
    """Narrow jobs that fill all CPUs, a wide job behind them, and more narrow jobs behind that one."""

    def __init__(self, submitter: Submitter, cpus: int, expected: Any = None) -> None:
        self._submitter = submitter
        options = {} if expected is None else {"expected": expected}
        self.narrow = [self._send(1, options) for _ in range(2 * cpus)]
        self.wide = self._send(2, options)
        self.narrow += [self._send(1, options) for _ in range(NARROW)]

    def _send(self, cpus: int, options: dict[str, Any]) -> str:
        return self._submitter.send(SLEEP, RUN, cpus=cpus, ignore_result=True, **options)

    def passed(self) -> int:
        """Wait for the wide job; return the number of narrow jobs that started before it."""
        started = self._submitter.ended(self.wide).started_at
        query = text("SELECT count(*) FROM jobs WHERE id = ANY(:ids) AND started_at < :started")
        with self._submitter.platform.engine.connect() as connection:
            return int(connection.execute(query, {"ids": self.narrow, "started": started}).scalar_one())

    def cancel(self) -> None:
        """Take back the rest, and wait for its end."""
        self._submitter.app.control.revoke(self.narrow)
        for job in self.narrow:
            self._submitter.ended(job)


def kept(platform: Platform) -> list[str]:
    workers: Any = platform.redis.hvals(keys.KEYS["kept"])
    return [worker.decode() for worker in workers]


@pytest.mark.parametrize("expected", [None, 0.01, "1d"], ids=["unknown", "too-short", "too-long"])
def test_wide_job_starts_under_a_stream_of_narrow_ones(platform: Platform, submitter: Submitter, expected: Any) -> None:
    platform.worker("a", cpus=2, pool="threads", PLATFORM_RESERVE_AFTER=QUICK)
    stream = Stream(submitter, 2, expected)
    assert stream.passed() < len(stream.narrow)
    stream.cancel()


def test_wide_job_starts_though_its_reserved_worker_died(platform: Platform, submitter: Submitter) -> None:
    workers = {name: platform.worker(name, cpus=2, pool="threads", PLATFORM_RESERVE_AFTER=QUICK) for name in ("a", "b")}
    stream = Stream(submitter, 4, "1d")
    (reserved,) = until(lambda: kept(platform), "a worker is reserved")
    workers[reserved].kill()
    assert stream.passed() < len(stream.narrow)
    stream.cancel()


def test_wide_job_starts_though_the_ledger_was_lost(platform: Platform, submitter: Submitter) -> None:
    platform.worker("a", cpus=2, pool="threads", PLATFORM_RESERVE_AFTER=QUICK)
    stream = Stream(submitter, 2)
    epoch = platform.redis.hget(keys.EPOCH, "epoch")
    platform.redis.flushdb()
    until(lambda: platform.redis.hget(keys.EPOCH, "epoch") not in (None, epoch), "the ledger is opened anew")
    assert stream.passed() < len(stream.narrow)
    stream.cancel()
