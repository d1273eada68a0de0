"""The end of a pool process, or of a body in it, costs at most that attempt.

The worker lives, and its capacity is right.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.faults.breaking import faults as breaking
from tests.faults.breaking.servers import Servers
from tests.faults.judging.oracle import read
from tests.faults.judging.watching import Oracle
from tests.fixtures.jobs.submitting import Submitter, standing_platform
from tests.fixtures.processes.platforms import Platform
from tests.fixtures.waiting import until
from tests.tasks.lasting import Gate

#: Bytes of the control group of a process that asks for more.
GROUP_BYTES = 64 * 2**20


@pytest.fixture(scope="module")
def platform(own_pair: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """Yield a platform with one worker for all tests of this module, none of which may end the worker."""
    own_pair.whole()
    with standing_platform(own_pair.pair, tmp_path_factory.mktemp("children"), *breaking.IMPORTS) as running:
        running.worker("a", cpus=4)
        yield running


@pytest.mark.parametrize(
    ("how", "ends_as", "outcomes"),
    [
        ("die", "succeeded", ["lost", "succeeded"]),
        ("no memory", "failed", ["failed"]),
        ("too much memory", "failed", ["failed"]),
        ("leave", "failed", ["failed"]),
    ],
)
def test_a_body_that_ends_itself_or_its_process_costs_that_attempt(
    submitter: Submitter, oracle: Oracle, how: str, ends_as: str, outcomes: list[str]
) -> None:
    with oracle.flow(submitter):
        jobs = [oracle.send(submitter, how=how, expected=[ends_as]) for _ in range(4)]
        oracle.whole_again(f"a body that ends by: {how}")
        for job in jobs:
            submitter.ended(job)
    oracle.assert_zeros()
    assert [submitter.outcomes(job) for job in jobs] == [outcomes] * len(jobs)


@contextmanager
def small_group() -> Iterator[Path | None]:
    """Yield a control group of either version whose processes may have GROUP_BYTES, or None if none can be made."""
    root = Path("/sys/fs/cgroup")
    versions = ((root / "memory", "memory.limit_in_bytes"), (root, "memory.max"))
    for parent, limit in versions:
        group = parent / f"celery-capacity-{os.getpid()}"
        try:
            group.mkdir()
            (group / limit).write_text(str(GROUP_BYTES))
        except OSError:
            if group.exists():
                group.rmdir()
            continue
        try:
            yield group
        finally:
            until(lambda: not (group / "cgroup.procs").read_text(), "its processes have ended")  # noqa: B023
            group.rmdir()
        return
    yield None


def test_a_process_that_the_kernel_ends_for_its_memory_costs_that_attempt(
    submitter: Submitter, oracle: Oracle, gate: Gate
) -> None:
    """If no control group can be made, the test kills the process as the kernel would."""
    with small_group() as group:
        job = oracle.send(submitter, seconds=gate, how="take memory" if group else "die")
        lines = until(lambda: [line for line in read(oracle.trace) if line.job == job], "it runs")
        if group is not None:
            (group / "cgroup.procs").write_text(str(lines[0].pid))
        gate.open()
        assert submitter.ended(job).attempt == 2
    oracle.assert_zeros()
    assert submitter.outcomes(job) == ["lost", "succeeded"]
    assert "signal 9" in submitter.attempts(job)[0].error


@pytest.mark.parametrize("limit", ["time_limit", "soft_time_limit"])
def test_a_body_that_is_over_its_limit_fails_alone(submitter: Submitter, oracle: Oracle, limit: str) -> None:
    with oracle.flow(submitter):
        options: dict[str, Any] = {"seconds": 30.0, "expected": ["failed"], limit: 1}
        late = [oracle.send(submitter, **options) for _ in range(2)]
        for job in late:
            assert "TimeLimitExceeded" in submitter.ended(job).error
    oracle.assert_zeros()
    assert [submitter.outcomes(job) for job in late] == [["failed"]] * 2


def test_terminated_job_is_cancelled_or_has_succeeded_at_any_moment(submitter: Submitter, oracle: Oracle) -> None:
    chance, pause = random.Random(3), threading.Event()
    jobs = [oracle.send(submitter, seconds=0.2) for _ in range(40)]
    for job in chance.sample(jobs, len(jobs)):
        oracle.expect(job, "cancelled")
        submitter.app.control.revoke(job, terminate=True, signal="SIGKILL")
        pause.wait(chance.uniform(0.0, 0.1))
    # A job that was terminated by mistake under the same process would run again.
    after = oracle.sends(submitter, 8)
    oracle.assert_zeros()
    assert all(submitter.row(job).state == "succeeded" for job in after)
    assert all(len(submitter.attempts(job)) <= 1 for job in jobs)


def test_process_killed_while_its_worker_becomes_ready_is_replaced(
    platform: Platform, submitter: Submitter, oracle: Oracle
) -> None:
    imports = ",".join([*breaking.IMPORTS, "tests.tasks.childless"])
    worker = platform.worker("killed", cpus=2, PLATFORM_RESOURCES="killed=2", PLATFORM_IMPORTS=imports)

    def both_ran() -> bool:
        # A process may be done with several jobs while the other process is started.
        oracle.send(submitter, resources={"killed": 1})
        return len({line.pid for line in read(oracle.trace)}) == 2

    until(both_ran, "the process that replaces the killed one runs a job, as the other does")
    oracle.assert_zeros()
    oracle.asked(worker)
    assert worker.stop() == 0


def test_processes_that_are_replaced_after_each_job_lose_none(
    platform: Platform, submitter: Submitter, oracle: Oracle
) -> None:
    arguments = ("--max-tasks-per-child", "1")
    worker = platform.worker("one", cpus=4, arguments=arguments, PLATFORM_RESOURCES="one=4")
    before = {child.pid for child in psutil.Process(worker.pid).children()}
    jobs = [oracle.send(submitter, seconds=0.02, resources={"one": 1}) for _ in range(20)]
    oracle.assert_zeros()
    assert {submitter.row(job).losses for job in jobs} == {0}
    pids = {line.pid for line in read(oracle.trace)}
    assert len(pids) == len(jobs)
    assert pids - before
    oracle.asked(worker)
    assert worker.stop() == 0
