"""The jobs and the name of a worker that dies."""

from __future__ import annotations

import os
import signal
from typing import Any

import psutil
import pytest
from celery.exceptions import WorkerLostError
from sqlalchemy import text

from celery_capacity.routing.ledger import keys
from celery_capacity.workers.process.exit_codes import Exit
from tests.faults.judging.oracle import read
from tests.faults.judging.watching import Oracle
from tests.fixtures import tasks
from tests.fixtures.jobs.submitting import Submitter
from tests.fixtures.processes.platforms import READY, Platform, Pool
from tests.fixtures.waiting import until
from tests.tasks.lasting import Gate

ADD = "tests.fixtures.tasks.add"
HOLD = "tests.fixtures.tasks.hold"
#: Intervals at their full length, for tests in which nothing may lapse.
FULL = {"PLATFORM_WORKER_TTL": "60", "PLATFORM_LOST_AFTER": "75"}


def held(platform: Platform, gate: str, job: str) -> int:
    """Wait for the job to run at the gate; return the pid of its process."""
    running_job, pid = tasks.started(platform.redis, gate)
    assert running_job == job
    return pid


def lease_ms(platform: Platform, worker: str) -> int:
    """Return the end of the worker's lease in milliseconds, by the ledger's clock."""
    lease: Any = platform.redis.hget(keys.book(worker), "lease")
    return int(lease)


def views(platform: Platform) -> set[str]:
    """Return the keys that a person sees with KEYS "worker:*"."""
    names: Any = platform.redis.keys("worker:*")
    return {key.decode() for key in names}


def all_outcomes(submitter: Submitter, job: str, *outcomes: str) -> None:
    """Wait for the outcomes of all attempts.

    A duty writes the outcomes that the ledger noted without the job's worker.
    """
    until(
        lambda: submitter.outcomes(job) == list(outcomes),
        lambda: f"the outcomes {outcomes}, they are {submitter.outcomes(job)}",
    )


# -- one of its processes


def test_a_job_whose_process_is_killed_runs_again_as_attempt_2(platform: Platform, submitter: Submitter) -> None:
    platform.environment |= FULL
    worker = platform.worker("a", cpus=2)
    job = submitter.send(HOLD, "gate", cpus=2)
    killed = held(platform, "gate", job)
    until_ms = lease_ms(platform, "a")
    os.kill(killed, signal.SIGKILL)
    assert held(platform, "gate", job) != killed
    row = until(lambda: (latest := submitter.row(job)).attempt == 2 and latest, "attempt 2 is in the row")
    assert (row.state, row.losses, row.worker) == ("running", 1, "a")
    assert submitter.allocated_cpus() == "2"
    tasks.let_go(platform.redis, "gate")
    assert submitter.value(job) == "a"
    assert submitter.ended(job).state == "succeeded"
    assert submitter.outcomes(job) == ["lost", "succeeded"]
    first = submitter.attempts(job)[0]
    assert "signal 9" in first.error
    assert first.ended_at.timestamp() < until_ms / 1000, "nothing had to lapse"
    assert submitter.allocated_cpus() == "0"
    assert worker.alive


def test_job_that_loses_three_processes_is_lost_and_its_neighbours_are_not(
    platform: Platform, submitter: Submitter
) -> None:
    platform.worker("a", cpus=4)
    neighbours = [submitter.send(HOLD, "neighbours") for _ in range(2)]
    for _ in neighbours:
        tasks.started(platform.redis, "neighbours")
    poison = submitter.send(HOLD, "poison", cpus=2)
    for losses in range(3):
        if losses == 2:
            # The neighbours saw two deaths beside them. The last try may be made alone.
            tasks.let_go(platform.redis, "neighbours", len(neighbours))
            assert [submitter.ended(job).state for job in neighbours] == ["succeeded"] * 2
        os.kill(held(platform, "poison", poison), signal.SIGKILL)
    row = submitter.ended(poison)
    assert (row.state, row.attempt, row.losses) == ("lost", 3, 3)
    assert "signal 9" in row.error
    assert submitter.outcomes(poison) == ["lost"] * 3
    with pytest.raises(WorkerLostError, match="signal 9"):
        submitter.value(poison)
    assert [submitter.outcomes(job) for job in neighbours] == [["succeeded"]] * 2
    assert submitter.value(submitter.send(ADD, 1, 1, cpus=4)) == 2


# -- all of it


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_worker_whose_main_process_is_killed_is_followed_at_once(
    platform: Platform, submitter: Submitter, oracle: Oracle, pool: Pool
) -> None:
    platform.environment |= FULL
    former = platform.worker("a", cpus=4, pool=pool)
    children = psutil.Process(former.pid).children(recursive=True)
    with oracle.flow(submitter):
        oracle.until_runs(10)
        oracle.asked(former)
        former.signal(signal.SIGKILL)
        former.wait()
        platform.worker("a", cpus=4, pool=pool)
        oracle.whole_again(f"kill a worker's main process ({pool}), started again at once")
        oracle.until_more(10)
    # No process is left that would run a job which another worker has now.
    _, alive = psutil.wait_procs(children, timeout=60)
    assert alive == []
    oracle.assert_zeros()


def test_what_a_body_started_is_ended_with_its_worker(platform: Platform, submitter: Submitter, oracle: Oracle) -> None:
    former = platform.worker("a", cpus=1)
    job = oracle.send(submitter, how="grandchild")
    oracle.until_runs(1)
    main = psutil.Process(former.pid)
    until(lambda: any(process.name() == "sleep" for process in main.children(recursive=True)), "it started a process")
    descendants = main.children(recursive=True)
    try:
        oracle.asked(former)
        former.signal(signal.SIGKILL)
        former.wait()
        platform.worker("a", cpus=1)
        assert submitter.ended(job).attempt == 2
        _, alive = psutil.wait_procs(descendants, timeout=60)
        assert alive == []
        oracle.assert_zeros()
    finally:
        for process in descendants:
            if process.is_running():
                process.kill()


@pytest.mark.long
def test_neighbour_ends_bodies_of_a_lost_worker_that_others_took_back(
    platform: Platform, submitter: Submitter, oracle: Oracle, gate: Gate
) -> None:
    imports = f"{platform.environment['PLATFORM_IMPORTS']},tests.tasks.cloned"
    # The first worker runs the duties, and knows nothing of the processes here.
    platform.worker("elsewhere", cpus=1, pool="threads", PLATFORM_IMPORTS=imports)
    busy = oracle.send(submitter, seconds=gate)
    oracle.until_runs(1)
    lost = platform.worker("a", cpus=1)
    job = oracle.send(submitter, how="grandchild")
    oracle.until_runs(2)
    platform.worker("b", cpus=1)
    main = psutil.Process(lost.pid)
    until(lambda: any(process.name() == "sleep" for process in main.children(recursive=True)), "it started a process")
    descendants = main.children(recursive=True)
    try:
        oracle.asked(lost)
        lost.signal(signal.SIGKILL)
        lost.wait()
        assert submitter.ended(job).worker == "b"
        _, alive = psutil.wait_procs(descendants, timeout=60)
        assert alive == []
        gate.open()
        assert submitter.outcomes(busy) in ([None], ["succeeded"])
        oracle.assert_zeros()
    finally:
        for process in descendants:
            if process.is_running():
                process.kill()


@pytest.mark.long
def test_a_worker_that_is_never_started_again_loses_its_jobs_to_the_others(
    platform: Platform, submitter: Submitter, oracle: Oracle, gate: Gate
) -> None:
    killed = platform.worker("a", cpus=4)
    platform.worker("b", cpus=4, pool="threads")
    with oracle.flow(submitter, every=0.1):
        oracle.until_runs(10)
        held_here = oracle.sends(submitter, 4, seconds=gate)
        until(lambda: {submitter.row(job).state for job in held_here} <= {"running", "waiting"}, "they run")
        oracle.asked(killed)
        killed.kill()
        gate.open()
        oracle.whole_again("kill a worker for good")
        oracle.until_more(10)
    oracle.assert_zeros()


@pytest.mark.long
def test_job_of_a_killed_worker_runs_on_another(platform: Platform, submitter: Submitter) -> None:
    settings = platform.settings
    killed = platform.worker("a", cpus=4)
    job = submitter.send(HOLD, "gate", cpus=4)
    held(platform, "gate", job)
    platform.worker("b", cpus=4)
    waits = submitter.send(HOLD, "beside", cpus=3)
    held(platform, "beside", waits)
    until(lambda: views(platform) == {"worker:a", "worker:b"}, "both are seen")
    killed.kill()
    until(lambda: views(platform) == {"worker:b"}, "a is no longer seen")
    lease = lease_ms(platform, "a")
    tasks.let_go(platform.redis, "beside")
    assert submitter.ended(waits).state == "succeeded"
    held(platform, "gate", job)
    row = until(lambda: (latest := submitter.row(job)).attempt == 2 and latest, "attempt 2 is in the row")
    assert (row.worker, row.losses) == ("b", 1)
    grace = settings.lost_after - settings.worker_ttl
    assert row.admitted_at.timestamp() >= lease / 1000 + grace - 0.01
    tasks.let_go(platform.redis, "gate")
    assert submitter.value(job) == "b"
    assert submitter.ended(job).state == "succeeded"
    all_outcomes(submitter, job, "lost", "succeeded")
    with platform.engine.connect() as connection:
        status = {row.name: row.status for row in connection.execute(text("SELECT name, status FROM workers"))}
    assert status == {"a": "lost", "b": "ready"}
    assert submitter.allocated_cpus() == "0"


def test_restarted_worker_takes_over_from_its_dead_life_at_once(platform: Platform, submitter: Submitter) -> None:
    platform.environment |= FULL
    former = platform.worker("a", cpus=2)
    job = submitter.send(HOLD, "gate", cpus=2)
    held(platform, "gate", job)
    former.kill()
    until_ms = lease_ms(platform, "a")
    again = platform.worker("a", cpus=2)
    held(platform, "gate", job)
    row = until(lambda: (latest := submitter.row(job)).attempt == 2 and latest, "attempt 2 is in the row")
    assert row.admitted_at.timestamp() < until_ms / 1000
    assert not any("silent" in line for line in again.lines)
    tasks.let_go(platform.redis, "gate")
    assert submitter.ended(job).state == "succeeded"
    all_outcomes(submitter, job, "lost", "succeeded")
    first, second = submitter.attempts(job)
    assert first.incarnation != second.incarnation == submitter.view("a")["incarnation"]


def test_a_twin_is_refused_under_load_and_harms_nobody(
    platform: Platform, submitter: Submitter, oracle: Oracle
) -> None:
    first = platform.worker("a", cpus=4)
    incarnation = submitter.view("a")["incarnation"]
    with oracle.flow(submitter):
        oracle.until_runs(10)
        twin = platform.worker("a", cpus=4, pool="threads", ready=False)
        oracle.asked(twin)
        assert twin.wait() == Exit.UNAVAILABLE
        oracle.until_more(10)
    oracle.assert_zeros()
    assert first.alive and submitter.view("a")["incarnation"] == incarnation
    assert {line.incarnation for line in read(oracle.trace)} <= {"", incarnation}
    assert not any(READY in line for line in twin.lines)
