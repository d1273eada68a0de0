"""A worker is stopped for longer than its jobs wait for it, and then goes on: all its stale writes are refused."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from celery_capacity.routing.ledger import keys
from tests.faults.judging.oracle import read
from tests.faults.judging.watching import Oracle
from tests.fixtures.jobs.submitting import Submitter
from tests.fixtures.processes.platforms import Platform, Pool
from tests.fixtures.waiting import until
from tests.tasks.lasting import Gate


def refused_writes(platform: Platform) -> int:
    """Return the number of refused writes of stale attempts, by the counters."""
    fields: Any = platform.redis.hgetall(keys.COUNTERS)
    return sum(int(count) for name, count in fields.items() if name.startswith(b"stale."))


@pytest.mark.long
@pytest.mark.parametrize("pool", ["prefork", "threads", "gevent"])
def test_wholly_stopped_worker_leaves_one_effect_of_each_job(
    platform: Platform, submitter: Submitter, oracle: Oracle, gate: Gate, tmp_path: Path, pool: Pool
) -> None:
    zombie = platform.worker("a", cpus=4, pool=pool)
    jobs = oracle.sends(submitter, 4, seconds=gate)
    oracle.until_runs(4)
    os.killpg(zombie.pid, signal.SIGSTOP)
    try:
        platform.worker("b", cpus=4, pool="threads")
        with oracle.flow(submitter, every=0.1):
            # The jobs run again: a is given up, and b has them.
            until(lambda: {submitter.row(job).attempt for job in jobs} == {2}, "all run again")
            gate.open()
            until(lambda: all(submitter.row(job).state == "succeeded" for job in jobs), "they succeed")
            os.killpg(zombie.pid, signal.SIGCONT)
            oracle.whole_again(f"stop a worker with all its processes ({pool})")
            until(lambda: oracle.ends_of(jobs) == 2 * len(jobs), "the bodies of the stopped worker end too")
            oracle.until_more(10)
    finally:
        os.killpg(zombie.pid, signal.SIGCONT)
    oracle.assert_zeros()
    until(lambda: refused_writes(platform) >= len(jobs), lambda: f"refused writes: {refused_writes(platform)}")
    assert [submitter.outcomes(job) for job in jobs] == [["lost", "succeeded"]] * len(jobs)
    # The worker is an ordinary worker again.
    # Its stopped bodies took CPUs without a lease. The next heartbeat publishes those again.
    until(lambda: submitter.view("a").get("cpus") == "4", "a is registered again, with all its CPUs")
    filling = Gate(tmp_path / "filling")
    again = oracle.sends(submitter, 8, seconds=filling)

    def workers_of_all() -> set[str]:
        lines = [line for line in read(oracle.trace) if line.job in again]
        return {line.worker for line in lines} if len(lines) == len(again) else set()

    assert until(workers_of_all, "all run at once") == {"a", "b"}
    filling.open()
    oracle.assert_zeros()


@pytest.mark.long
def test_worker_with_a_stopped_main_process_leaves_one_effect_of_each_job(
    platform: Platform, submitter: Submitter, oracle: Oracle, gate: Gate
) -> None:
    """The worker's pool goes on: ends there are noted only when the main process continues."""
    zombie = platform.worker("a", cpus=4)
    short = oracle.sends(submitter, 2, seconds=0.5)
    long = oracle.sends(submitter, 2, seconds=gate)
    oracle.until_runs(4)
    zombie.signal(signal.SIGSTOP)
    try:
        platform.worker("b", cpus=4, pool="threads")
        until(lambda: {submitter.row(job).attempt for job in long} == {2}, "those that ran run again")
        zombie.signal(signal.SIGCONT)
        oracle.whole_again("stop a worker's main process")
        gate.open()
    finally:
        zombie.signal(signal.SIGCONT)
    oracle.assert_zeros()
    until(lambda: refused_writes(platform) >= len(long), lambda: f"refused writes: {refused_writes(platform)}")
    assert all(submitter.row(job).state == "succeeded" for job in short + long)
