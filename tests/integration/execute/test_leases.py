"""Lost attempts, and attempts that no longer hold their job: which runs again, which runs alone, which commits.

Each test kills or stops by signal the process that its name says. Then the platform goes on by itself.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery.exceptions import WorkerLostError
from sqlalchemy import text

from celery_capacity import InvalidRequest
from celery_capacity.routing.config.embedded import Pair
from tests.fixtures import tasks
from tests.fixtures.jobs.leasing import (
    ADD,
    DEADLY,
    HOLD,
    NUMBERED,
    ONCE,
    WORK,
    at_gate,
    outcomes,
    platform_with_effects,
)
from tests.fixtures.jobs.submitting import Submitter
from tests.fixtures.processes.platforms import Platform, Process
from tests.fixtures.waiting import until


@pytest.fixture
def platform(server_pair: Pair, tmp_path: Path) -> Iterator[Platform]:
    with platform_with_effects(server_pair, tmp_path) as running:
        yield running


# -- what must not start twice


def test_a_job_that_must_not_run_again_is_lost_with_its_process(platform: Platform, submitter: Submitter) -> None:
    platform.worker("a", cpus=2)
    job = submitter.send(ONCE, "gate")
    assert not submitter.row(job).rerun
    os.kill(at_gate(platform, "gate", job), signal.SIGKILL)
    row = submitter.ended(job)
    assert (row.state, row.attempt, row.losses) == ("lost", 1, 1)
    with pytest.raises(WorkerLostError, match="signal 9"):
        submitter.value(job)
    outcomes(submitter, job, "lost")


def test_a_job_that_must_not_run_again_is_lost_with_its_worker(platform: Platform, submitter: Submitter) -> None:
    killed = platform.worker("a", cpus=2)
    # The call forbids a rerun; the task itself would run again.
    job = submitter.send(HOLD, "gate", rerun=False)
    other = submitter.send(HOLD, "gate")
    for _ in range(2):
        tasks.started(platform.redis, "gate")
    killed.kill()
    platform.worker("a", cpus=2)
    row = submitter.ended(job)
    assert (row.state, row.attempt, row.losses) == ("lost", 1, 1)
    with pytest.raises(WorkerLostError):
        submitter.value(job)
    at_gate(platform, "gate", other)
    tasks.let_go(platform.redis, "gate")
    assert submitter.value(other) == "a"


def test_a_job_that_was_broken_off_and_must_not_run_again_ends_as_lost(
    platform: Platform, submitter: Submitter
) -> None:
    first = platform.worker("a", cpus=1)
    job = submitter.send(ONCE, "gate")
    at_gate(platform, "gate", job)
    platform.worker("b", cpus=1)
    first.signal(signal.SIGQUIT)
    first.wait()
    row = submitter.ended(job)
    assert (row.state, row.attempt) == ("lost", 1)
    # The job is not at the gate again.
    other = submitter.send(HOLD, "gate")
    at_gate(platform, "gate", other)
    tasks.let_go(platform.redis, "gate")
    assert submitter.value(other) == "b"


def test_task_unknown_to_its_sender_is_not_to_be_run_again(platform: Platform, submitter: Submitter) -> None:
    platform.worker("a", cpus=1)
    job = submitter.app.send_task(ONCE, ["gate"]).id
    assert not submitter.row(job).rerun
    tasks.let_go(platform.redis, "gate")
    assert submitter.ended(job).state == "succeeded"


@pytest.mark.parametrize("value", ["no", 0, 1])
def test_a_wrong_rerun_is_refused(platform: Platform, submitter: Submitter, value: Any) -> None:
    with pytest.raises(InvalidRequest, match="rerun"):
        submitter.send(ADD, 1, 2, rerun=value)
    assert submitter.jobs() == 0


def test_the_losses_after_which_a_job_is_lost_are_a_setting(platform: Platform, submitter: Submitter) -> None:
    platform.worker("a", cpus=2, PLATFORM_MOST_LOSSES="1")
    job = submitter.send(HOLD, "gate")
    os.kill(at_gate(platform, "gate", job), signal.SIGKILL)
    assert submitter.ended(job).state == "lost"


# -- the last attempt runs alone


@pytest.mark.long
def test_task_that_kills_workers_is_lost_and_its_neighbours_succeed(
    platform: Platform, submitter: Submitter, tmp_path: Path
) -> None:
    deaths, trace = tmp_path / "deaths", tmp_path / "trace"
    workers = {name: platform.worker(name, cpus=4) for name in ("a", "b")}
    jobs = [submitter.send(WORK, str(trace), str(n), 0.1, 1000) for n in range(100)]
    poison = submitter.send(DEADLY, str(deaths), priority=9)
    jobs += [submitter.send(WORK, str(trace), str(n), 0.1, 1000) for n in range(100, 200)]

    def tended() -> bool:
        for name, worker in workers.items():
            if not worker.alive:
                workers[name] = platform.worker(name, cpus=4)
        return all(submitter.row(job).finished_at is not None for job in [poison, *jobs])

    until(tended, "all are over", 120.0)
    assert len(deaths.read_text().splitlines()) == 3
    assert submitter.row(poison).state == "lost"
    assert submitter.outcomes(poison) == ["lost"] * 3
    assert {submitter.row(job).state for job in jobs} == {"succeeded"}
    # Nothing else ran beside the last attempt: the third death cost nobody anything.
    last = submitter.attempts(poison)[-1]
    with platform.engine.connect() as connection:
        beside = connection.execute(
            text(
                "SELECT count(*) FROM attempts WHERE incarnation = :incarnation AND job_id <> :job "
                "AND started_at < :ended AND (ended_at IS NULL OR ended_at > :started)"
            ),
            {"incarnation": last.incarnation, "job": poison, "started": last.admitted_at, "ended": last.ended_at},
        ).scalar_one()
    assert beside == 0


def test_a_job_that_must_run_alone_gets_a_worker_though_others_keep_coming(
    platform: Platform, submitter: Submitter
) -> None:
    platform.worker("a", cpus=2)
    beside = submitter.send(HOLD, "beside")
    at_gate(platform, "beside", beside)
    job = submitter.send(HOLD, "gate")
    for _ in range(2):
        os.kill(at_gate(platform, "gate", job), signal.SIGKILL)
    # Another loss would end the job. A slot is free, and nobody gets it before the worker is empty.
    submitter.until(job, "waiting")
    waits = submitter.send(ADD, 1, 2)
    submitter.until(waits, "waiting")
    assert "a takes nothing else until it is" in platform.celery("job", job).stdout
    assert "a is left to a job that must run alone" in platform.celery("job", waits).stdout
    assert submitter.allocated_cpus() == "1"
    tasks.let_go(platform.redis, "beside")
    at_gate(platform, "gate", job)
    assert submitter.ended(beside).state == "succeeded"
    assert submitter.row(waits).state == "waiting"
    tasks.let_go(platform.redis, "gate")
    assert submitter.value(waits) == 3
    assert submitter.ended(job).state == "succeeded"
    outcomes(submitter, job, "lost", "lost", "succeeded")
    assert "alone" not in platform.celery("cluster", "--json").stdout


# -- an attempt that lost its lease and still runs


def test_room_of_an_attempt_without_its_lease_is_not_offered(
    platform: Platform, submitter: Submitter, stopped: Process
) -> None:
    job = submitter.send(NUMBERED, "gate", cpus=2)
    at_gate(platform, "gate.1", job)
    os.killpg(stopped.pid, signal.SIGSTOP)
    platform.worker("b", cpus=2)
    at_gate(platform, "gate.2", job)
    os.killpg(stopped.pid, signal.SIGCONT)
    until(lambda: submitter.view("a").get("cpus") == "0", "a publishes what is left")
    waits = submitter.send(ADD, 1, 2, cpus=2)
    submitter.until(waits, "waiting")
    tasks.let_go(platform.redis, "gate.1")
    assert submitter.ended(waits).worker == "a"
    assert submitter.view("a")["cpus"] == "2"
    assert not any("would exceed" in line for line in stopped.lines)
    tasks.let_go(platform.redis, "gate.2")
    assert submitter.ended(job).state == "succeeded"
    outcomes(submitter, job, "lost", "succeeded")
