"""Clients may die at any step of a submission, submit more jobs than there is room for, and have a wrong clock."""

from __future__ import annotations

import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import pytest

from tests.faults.judging.watching import Oracle
from tests.fixtures.jobs.submitting import Submitter
from tests.fixtures.processes.platforms import Platform, Process
from tests.fixtures.waiting import until
from tests.tasks.stepping import SIGNAL

_clients = count()

#: Steps of a submission at which the program dies. It dies in its third submission, so that the others are complete.
STEPS = (
    "before celery_capacity.routing.insert.inserter:Inserter.insert@3",
    "after celery_capacity.routing.insert.inserter:Inserter.insert@3",
    "before celery_capacity.workers.dispatch.breaker:Breaker.submit@3",
    "after celery_capacity.workers.dispatch.breaker:Breaker.submit@3",
)
#: Submissions at once: a tenth of the 10,000 of the full test.
BURST = 1_000
SUBMITTERS = 4


def client(platform: Platform, oracle: Oracle, jobs: int, *how: str, **environment: str) -> Process:
    """Submit so many jobs in a separate process, and report the accepted jobs to the oracle after its end."""
    prefix = f"client-{next(_clients)}"
    arguments = [sys.executable, "-m", "tests.faults.clients.client", str(oracle.trace), str(jobs), prefix, *how]
    process = Process(prefix, arguments, {**platform.environment, **environment}, platform.folder)
    process.wait()
    process.finish(10.0)
    tried = [int(line.split()[1]) for line in process.lines if line.startswith("try ")]
    took = [int(line.split()[1]) for line in process.lines if line.startswith("took ")]
    for number in took:
        oracle.accepted(f"{prefix}-{number}", number)
    for number in set(tried) - set(took):
        # The program died meanwhile: the job is accepted if it has a row.
        oracle.unsure(f"{prefix}-{number}", number)
    return process


def test_program_dying_at_any_step_of_a_submission_loses_nothing(
    platform: Platform, submitter: Submitter, oracle: Oracle
) -> None:
    platform.worker("a", cpus=4, pool="threads")
    for number, step in enumerate(STEPS):
        once = platform.folder / f"died-{number}"
        process = client(platform, oracle, 5, "step by step", DIE_AT=step, DIE_ONCE=str(once))
        assert once.exists(), f"nobody came to {step}:\n{process.tail()}"
        assert process.wait() == -9
    oracle.whole_again("a client dies between insert and admission")
    oracle.assert_zeros()
    with_rows = {job for job in oracle.values if submitter.row(job)}
    # Two of five jobs were accepted before each death, and the third job if its row was written.
    assert len(with_rows) == 2 * len(STEPS) + 3


def test_program_dying_with_batched_jobs_loses_and_doubles_nothing(
    platform: Platform, submitter: Submitter, oracle: Oracle
) -> None:
    platform.worker("a", cpus=4, pool="threads")
    for when in ("before", "after"):
        once = platform.folder / f"died-{when}"
        # The first job goes by itself, so the program dies at the second call.
        step = f"{when} celery_capacity.workers.dispatch.breaker:Breaker.submit@2"
        process = client(platform, oracle, 200, DIE_AT=step, DIE_ONCE=str(once))
        assert once.exists(), f"nobody came to {step}:\n{process.tail()}"
        assert process.wait() == -9
    oracle.whole_again("a client dies with jobs in its hands")
    oracle.assert_zeros()


@pytest.mark.parametrize("step", [3600.0, -3600.0], ids=["forwards", "backwards"])
def test_a_submitter_whose_clock_steps_by_an_hour_submits_as_before(
    platform: Platform, submitter: Submitter, oracle: Oracle, monkeypatch: pytest.MonkeyPatch, step: float
) -> None:
    platform.worker("a", cpus=4, pool="threads")
    oracle.sends(submitter, 4)
    clock = time.time
    with monkeypatch.context() as stepped:
        stepped.setattr(time, "time", lambda: clock() + step)
        jobs = oracle.sends(submitter, 8)
        until(lambda: all(submitter.row(job).state == "succeeded" for job in jobs), "they run")
    oracle.whole_again(f"the clock of a submitter steps by {step:g} s")
    oracle.assert_zeros()


@pytest.mark.long
@pytest.mark.parametrize("step", ["3600", "-3600"], ids=["forwards", "backwards"])
def test_a_worker_whose_clock_steps_by_an_hour_goes_on(
    platform: Platform, submitter: Submitter, oracle: Oracle, step: str
) -> None:
    platform.environment["PLATFORM_IMPORTS"] += ",tests.tasks.stepping"
    worker = platform.worker("a", cpus=4, pool="prefork", STEP_BY=step)
    platform.worker("b", cpus=2, pool="threads", STEP_BY="0")
    with oracle.flow(submitter):
        oracle.until_more(10)
        worker.signal(SIGNAL)
        worker.wait_for("the clock was stepped")
        oracle.whole_again(f"the clock of a worker steps by {step} s")
        # Wait long enough that a heartbeat, a lapse and a sweep are due by the new clock.
        threading.Event().wait(platform.settings.lost_after)
        oracle.until_more(10)
    oracle.assert_zeros()
    assert submitter.view("a")["status"] == "ready"


@pytest.mark.long
def test_a_burst_of_submissions_is_accepted_and_worked_off(
    platform: Platform, submitter: Submitter, oracle: Oracle
) -> None:
    platform.worker("a", cpus=4, pool="threads")
    platform.worker("b", cpus=4)
    with ThreadPoolExecutor(SUBMITTERS) as executor:
        for part in [
            executor.submit(oracle.sends, submitter, BURST // SUBMITTERS, seconds=0.0) for _ in range(SUBMITTERS)
        ]:
            part.result()
    oracle.whole_again(f"{BURST} submissions at once")
    oracle.assert_zeros(120.0)
    assert oracle.runs() == BURST
