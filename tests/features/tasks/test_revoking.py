"""Revoking: a job in any state, by its id or by its stamps, and for good.

Source: Celery, Workers Guide, "Commands".
"""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery.exceptions import TaskRevokedError
from celery.result import ResultSet

from celery_capacity.routing.config.embedded import Pair
from tests.fixtures import tasks
from tests.fixtures.jobs.submitting import Submitter, standing_platform
from tests.fixtures.processes.platforms import Platform, Process
from tests.fixtures.waiting import until
from tests.tasks.heard import HEARD

ADD = "tests.fixtures.tasks.add"
HOLD = "tests.fixtures.tasks.hold"
TASKS = "tests.tasks.heard"


@pytest.fixture(scope="module")
def heard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the file of the signals that workers heard."""
    return tmp_path_factory.mktemp("heard") / "signals"


@pytest.fixture(scope="module")
def platform(server_pair: Pair, heard: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    with standing_platform(server_pair, tmp_path_factory.mktemp("revoking"), TASKS) as running:
        running.environment[HEARD] = str(heard)
        running.worker("a", cpus=2)
        yield running


def revocations(heard: Path) -> Counter[tuple[str, bool, bool]]:
    """Return the number of signals `task_revoked`, by (job, terminated, expired)."""
    lines = heard.read_text().splitlines() if heard.exists() else []
    signals = [entry for entry in map(json.loads, lines) if entry["signal"] == "task_revoked"]
    return Counter((entry["job"], bool(entry["terminated"]), bool(entry["expired"])) for entry in signals)


def announced(heard: Path, job: str, terminated: bool = False, expired: bool = False) -> None:
    """Wait for the signal of a job, and assert that it came once."""
    until(lambda: revocations(heard)[job, terminated, expired], f"task_revoked of {job}")
    assert sum(count for (job_id, *_), count in revocations(heard).items() if job_id == job) == 1


def is_revoked(submitter: Submitter, job: str, match: str = "revoked") -> Any:
    """Assert that the job ended as revoked, and that its result says so. Return its row."""
    row = submitter.ended(job)
    assert row.state == "cancelled"
    until(lambda: submitter.result(job).state == "REVOKED", "its result is REVOKED")
    with pytest.raises(TaskRevokedError, match=match):
        submitter.value(job)
    return row


@pytest.fixture
def full(platform: Platform, submitter: Submitter) -> Iterator[str]:
    """Yield the id of a job that fills worker `a` until the end of the test."""
    job = submitter.send(HOLD, "full", cpus=2)
    tasks.started(platform.redis, "full")
    yield job
    tasks.let_go(platform.redis, "full")
    assert submitter.ended(job).state == "succeeded"


def test_what_waits_or_is_scheduled_ends_at_once(full: str, submitter: Submitter, heard: Path) -> None:
    jobs = [submitter.send(ADD, 1, 1), submitter.send(ADD, 1, 1, countdown=60)]
    several = [submitter.send(ADD, 1, 1) for _ in range(3)]
    for job in jobs:
        submitter.result(job).revoke()
    ResultSet([submitter.result(job) for job in several]).revoke()
    late = submitter.send(ADD, 1, 1, expires=0.3)
    for job in (*jobs, *several):
        row = is_revoked(submitter, job)
        assert (row.attempt, row.error) == (0, "revoked")
        announced(heard, job)
    assert submitter.ended(late).state == "expired"
    announced(heard, late, expired=True)


def test_by_stamp_whatever_they_do(full: str, platform: Platform, submitter: Submitter, heard: Path) -> None:
    def stamped(value: str, **options: Any) -> str:
        signature = submitter.app.signature(ADD, (1, 1), options=options)
        signature.stamp(build=value)
        return str(signature.apply_async().id)

    waiting, scheduled = stamped("17"), stamped("17", countdown=60)
    other, not_stamped = stamped("18"), submitter.send(ADD, 1, 1)
    assert submitter.row(not_stamped).stamps is None
    submitter.app.control.revoke_by_stamped_headers({"build": ["16", "17"]})
    for job in (waiting, scheduled):
        is_revoked(submitter, job)
        announced(heard, job)
    assert {submitter.row(job).state for job in (other, not_stamped)} <= {"accepted", "waiting"}
    # A job that is submitted later with a revoked stamp ends where it would start, as with Celery.
    submitter.app.control.revoke([other, not_stamped])


def test_a_running_job_is_terminated_by_its_stamp(platform: Platform, submitter: Submitter, heard: Path) -> None:
    signature = submitter.app.signature(HOLD, ("stamped",))
    signature.stamp(build="19")
    job = str(signature.apply_async().id)
    tasks.started(platform.redis, "stamped")
    submitter.app.control.revoke_by_stamped_headers({"build": "19"}, terminate=True)
    is_revoked(submitter, job, "terminated")
    announced(heard, job, terminated=True)


def test_a_running_job_goes_on_and_does_not_come_again(platform: Platform, submitter: Submitter, heard: Path) -> None:
    """The body ends by itself, as with Celery, and the messages that it publishes under its id are discarded."""
    ends = submitter.send(HOLD, "ends")
    again = submitter.send(f"{TASKS}.retries_when_let_go", "again")
    for job, gate in ((ends, "ends"), (again, "again")):
        tasks.started(platform.redis, gate)
        submitter.result(job).revoke()
        assert submitter.row(job).revoked_at is not None
        # No worker reports a running job as revoked.
        assert submitter.result(job).state == "PENDING"
        tasks.let_go(platform.redis, gate)
    assert submitter.value(ends) == "a"
    assert submitter.ended(ends).state == "succeeded"
    row = is_revoked(submitter, again)
    assert (row.attempt, row.error, submitter.outcomes(again)) == (1, "revoked", ["retried"])
    announced(heard, again)
    assert revocations(heard)[ends, False, False] == 0


def test_a_job_whose_process_dies_after_it_was_revoked_runs_no_more(
    platform: Platform, submitter: Submitter, heard: Path
) -> None:
    job = submitter.send(HOLD, "dies")
    _, pid = tasks.started(platform.redis, "dies")
    submitter.result(job).revoke()
    os.kill(pid, signal.SIGKILL)
    is_revoked(submitter, job)
    assert submitter.outcomes(job) == ["lost"]
    announced(heard, job)


def test_it_is_kept_for_a_worker_that_is_away(platform: Platform, submitter: Submitter, heard: Path) -> None:
    """The job was admitted to a stopped worker: it does not start if that comes back, and nobody else gets it."""
    away: Process = platform.worker("away", cpus=8, pool="threads")
    away.signal(signal.SIGSTOP)
    job = submitter.send(HOLD, "never", cpus=8)
    assert submitter.until(job, "accepted", "admitted").worker in (None, "away")
    submitter.result(job).revoke()
    assert submitter.row(job).revoked_at is not None
    away.signal(signal.SIGCONT)
    is_revoked(submitter, job)
    announced(heard, job)
    assert platform.redis.llen("never:started") == 0
    away.stop()


def test_command_line_and_plain_celery_revoke_waiting_jobs(
    full: str, platform: Platform, submitter: Submitter, heard: Path
) -> None:
    by_command, by_celery = submitter.send(ADD, 1, 1), submitter.send(ADD, 1, 1, countdown=60)
    done = platform.celery("control", "revoke", by_command)
    assert done.returncode == 0, done.stderr
    submitter.app.control.broadcast("revoke", {"task_id": [by_celery]})
    for job in (by_command, by_celery):
        is_revoked(submitter, job)
        announced(heard, job)


def test_purge_ends_the_backlog_and_nothing_else(full: str, platform: Platform, submitter: Submitter) -> None:
    waiting = [submitter.send(ADD, 1, 1) for _ in range(3)]
    scheduled = submitter.send(ADD, 1, 1, countdown=60)
    purged = platform.celery("purge", "-f")
    assert "Purged 3 messages" in purged.stdout, purged.stderr
    for job in waiting:
        assert is_revoked(submitter, job, "purged").error == "purged"
    assert (submitter.row(full).state, submitter.row(scheduled).state) == ("running", "scheduled")
    dropped = submitter.send(ADD, 1, 1)
    assert submitter.app.control.purge() == 1
    is_revoked(submitter, dropped, "purged")
    submitter.app.control.revoke(scheduled)


def test_forget_takes_the_result_and_leaves_the_job(submitter: Submitter) -> None:
    job = submitter.send(ADD, 1, 1)
    assert submitter.value(job) == 2
    submitter.result(job).forget()
    assert submitter.app.backend.get_state(job) == "PENDING"
    assert submitter.ended(job).state == "succeeded"
