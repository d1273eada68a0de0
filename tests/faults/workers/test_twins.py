"""Two machines have one host name: clones, a `hostname:` used twice, pods of two clusters. One of them is refused."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import pytest

from celery_capacity.workers.process.exit_codes import Exit
from tests.faults.judging.watching import Oracle
from tests.fixtures.jobs.submitting import Submitter
from tests.fixtures.processes.platforms import READY, Platform, Pool, Process
from tests.fixtures.waiting import until
from tests.tasks.lasting import Gate

#: Module that makes the importing worker believe that it runs after another boot, on a machine of the same id and host
#: name.
CLONED: Final = "tests.tasks.cloned"
TAKEN: Final = "a live worker is named a already"


def clone(platform: Platform, pool: Pool = "threads", *, ready: bool = False) -> Process:
    imports = f"{platform.environment['PLATFORM_IMPORTS']},{CLONED}"
    return platform.worker("a", cpus=4, pool=pool, ready=ready, PLATFORM_IMPORTS=imports)


def long_jobs(platform: Platform, oracle: Oracle, submitter: Submitter) -> list[str]:
    """Submit four jobs that run for longer than a silent worker takes to be lost, and wait until they run."""
    jobs = oracle.sends(submitter, 4, seconds=platform.settings.lost_after + 1)
    oracle.until_runs(4)
    return jobs


@contextmanager
def stopped(worker: Process) -> Iterator[None]:
    os.killpg(worker.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.killpg(worker.pid, signal.SIGCONT)


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_clone_of_a_live_worker_is_refused_and_its_jobs_go_on(
    platform: Platform, submitter: Submitter, oracle: Oracle, pool: Pool
) -> None:
    first = platform.worker("a", cpus=4, pool=pool)
    incarnation = submitter.view("a")["incarnation"]
    jobs = long_jobs(platform, oracle, submitter)
    twin = clone(platform, pool)
    oracle.asked(twin)
    assert twin.wait() == Exit.UNAVAILABLE
    twin.wait_for(TAKEN)
    oracle.assert_zeros()
    assert first.alive and submitter.view("a")["incarnation"] == incarnation
    assert [submitter.outcomes(job) for job in jobs] == [["succeeded"]] * len(jobs)
    assert not any("former incarnation" in line for line in twin.lines)


def test_of_two_clones_that_start_at_once_one_is_refused(
    platform: Platform, submitter: Submitter, oracle: Oracle
) -> None:
    with oracle.flow(submitter):
        both = [platform.worker("a", cpus=4, ready=False), clone(platform)]
        until(lambda: any(not worker.alive for worker in both), "one ends")
        refused, stays = both if not both[0].alive else both[::-1]
        oracle.asked(refused)
        assert refused.wait() == Exit.UNAVAILABLE
        stays.wait_for(READY)
        oracle.until_more(10)
    oracle.assert_zeros()
    assert stays.alive


def test_clone_is_refused_though_the_ledger_is_emptied_while_it_starts(
    platform: Platform, submitter: Submitter, oracle: Oracle
) -> None:
    first = platform.worker("a", cpus=4)
    jobs = long_jobs(platform, oracle, submitter)
    platform.redis.flushall()
    oracle.results_were_lost()
    twin = clone(platform)
    oracle.asked(twin)
    assert twin.wait() == Exit.UNAVAILABLE
    oracle.assert_zeros()
    assert first.alive
    assert [submitter.outcomes(job) for job in jobs] == [["succeeded"]] * len(jobs)


@pytest.mark.long
def test_clone_of_a_silent_worker_waits_for_its_lease_and_then_refuses_it(
    platform: Platform, submitter: Submitter, oracle: Oracle, gate: Gate
) -> None:
    first = platform.worker("a", cpus=4)
    jobs = oracle.sends(submitter, 4, seconds=gate)
    oracle.until_runs(4)
    oracle.asked(first)
    with stopped(first):
        twin = clone(platform, ready=True)
        twin.wait_for("is registered and silent")
        until(lambda: {submitter.row(job).attempt for job in jobs} == {2}, "all run again")
    gate.open()
    # At its next heartbeat, the worker learns that another worker has its name.
    assert first.wait() == Exit.UNAVAILABLE
    first.wait_for(TAKEN)
    oracle.assert_zeros()
    assert twin.alive
    assert [submitter.outcomes(job) for job in jobs] == [["lost", "succeeded"]] * len(jobs)
