"""A worker is stopped for longer than its lease, by SIGSTOP or a frozen machine, while its processes still run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil
import pytest

from celery_capacity.routing.ledger import keys
from tests.faults.judging.oracle import read
from tests.faults.judging.watching import Oracle
from tests.fixtures.jobs.submitting import Submitter
from tests.fixtures.processes.platforms import Platform, Pool, Process
from tests.fixtures.waiting import until
from tests.tasks.lasting import Gate


def family(worker: Process) -> list[psutil.Process]:
    """Return the worker's main process, its pool, and the processes that bodies started."""
    main = psutil.Process(worker.pid)
    return [main, *main.children(recursive=True)]


def running(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Return the processes that have not ended."""
    alive = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                alive.append(process)
    return alive


@contextmanager
def stopped(processes: list[psutil.Process]) -> Iterator[None]:
    """Stop the processes for the block; afterwards those that live go on."""
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.resume()


def lease_ms(platform: Platform) -> int:
    """Return the end of the lease of `a` in milliseconds, by the ledger's clock."""
    lease: Any = platform.redis.hget(keys.book("a"), "lease")
    return int(lease)


def held_jobs(oracle: Oracle, submitter: Submitter, gate: Gate, how: str = "") -> list[str]:
    """Submit four jobs that last until the gate is open, and wait until they run."""
    jobs = oracle.sends(submitter, 3, seconds=gate)
    jobs.append(oracle.send(submitter, how=how, seconds=0.1 if how else gate))
    oracle.until_runs(4)
    return jobs


@pytest.mark.long
@pytest.mark.parametrize("whole", [False, True], ids=["main process", "group"])
@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_successor_ends_the_jobs_of_its_stopped_predecessor_before_its_own(
    platform: Platform, submitter: Submitter, oracle: Oracle, gate: Gate, pool: Pool, whole: bool
) -> None:
    first = platform.worker("a", cpus=4, pool=pool)
    jobs = held_jobs(oracle, submitter, gate, how="grandchild")
    main = psutil.Process(first.pid)
    until(
        lambda: any(process.name() == "sleep" for process in main.children(recursive=True)), "a body started a process"
    )
    before = family(first)
    oracle.asked(first)
    with stopped(before if whole else before[:1]):
        successor = platform.worker("a", cpus=4, pool=pool)
        # The successor can be admitted to, so no process that it does not know may run here.
        assert running(before) == []
    gate.open()
    oracle.assert_zeros()
    assert [submitter.outcomes(job) for job in jobs] == [["lost", "succeeded"]] * len(jobs)
    assert successor.alive


@pytest.mark.long
def test_successor_ends_a_stopped_predecessor_that_was_given_up_before(
    platform: Platform, submitter: Submitter, oracle: Oracle, gate: Gate
) -> None:
    """The ledger has no book of the worker any more, since another worker took its jobs back. Its pool goes on."""
    first = platform.worker("a", cpus=4)
    jobs = held_jobs(oracle, submitter, gate)
    before = family(first)
    oracle.asked(first)
    with stopped(before[:1]):
        platform.worker("b", cpus=4, pool="threads")
        until(lambda: {submitter.row(job).worker for job in jobs} == {"b"}, "b has its jobs")
        assert len(running(before)) > 1
        platform.worker("a", cpus=4)
        assert running(before) == []
    gate.open()
    oracle.assert_zeros()
    assert [submitter.outcomes(job) for job in jobs] == [["lost", "succeeded"]] * len(jobs)


@pytest.mark.long
def test_worker_that_was_given_up_and_goes_on_keeps_its_name(
    platform: Platform, submitter: Submitter, oracle: Oracle
) -> None:
    """The worker is challenged first, though the ledger does not name it: a live worker answers by registering."""
    first = platform.worker("a", cpus=4, PLATFORM_WORKER_TTL="60", PLATFORM_LOST_AFTER="75")
    platform.redis.delete(keys.book("a"))
    with platform.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE workers SET status = 'lost', left_at = now()")
    twin = platform.worker("a", cpus=4, ready=False)
    oracle.asked(twin)
    twin.wait()
    twin.wait_for("a live worker is named a already")
    assert first.alive
    oracle.sends(submitter, 4)
    oracle.assert_zeros()


@pytest.mark.long
def test_stopped_child_of_a_live_worker_loses_nothing(
    platform: Platform, submitter: Submitter, oracle: Oracle, gate: Gate
) -> None:
    """The job is held by a worker that renews its lease, so it goes on where it was."""
    worker = platform.worker("a", cpus=2)
    job = oracle.send(submitter, seconds=gate)
    oracle.until_runs(1)
    pids = {line.pid for line in read(oracle.trace)}
    lease = lease_ms(platform)
    with stopped([psutil.Process(pid) for pid in pids]), oracle.flow(submitter, every=0.2):
        longer = platform.settings.lost_after * 1.5
        until(lambda: lease_ms(platform) > lease + longer * 1000, "it was stopped for longer than each lease")
        assert submitter.allocated_cpus() in ("1", "2")
    gate.open()
    oracle.assert_zeros()
    assert submitter.outcomes(job) == ["succeeded"]
    assert worker.alive
