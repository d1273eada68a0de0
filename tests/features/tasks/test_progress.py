"""Progress that tasks report, as workers keep it: in processes and threads, until the end, of the newest attempt."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import event

import celery_capacity
from celery_capacity.routing.config.embedded import Pair
from tests.fixtures import tasks
from tests.fixtures.jobs.submitting import Submitter, standing_platform
from tests.fixtures.processes.platforms import Platform
from tests.fixtures.waiting import until
from tests.tasks import reporting

REPORT, BY_STATE, AT_END = (f"tests.tasks.reporting.{name}" for name in ("report", "report_by_state", "report_at_end"))


@pytest.fixture(scope="module", params=["prefork", "threads"])
def platform(
    request: pytest.FixtureRequest, server_pair: Pair, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Platform]:
    with standing_platform(server_pair, tmp_path_factory.mktemp("progress"), "tests.tasks.reporting") as running:
        running.worker("a", cpus=2, pool=request.param)
        yield running


def progress(submitter: Submitter, job: str) -> Any:
    return celery_capacity.job(job, app=submitter.app).info().progress


def test_first_report_is_shown_at_once(platform: Platform, submitter: Submitter) -> None:
    job = submitter.send(REPORT, "first", [[1, 4, "frame 1"]])
    tasks.started(platform.redis, "first")
    reported = progress(submitter, job)
    assert (reported.current, reported.total, reported.message) == (1, 4, "frame 1")
    assert reported.at is not None
    tasks.let_go(platform.redis, "first")
    submitter.ended(job)


def test_last_report_stays_after_the_end(submitter: Submitter) -> None:
    job = submitter.send(AT_END, 500)
    submitter.ended(job)
    assert progress(submitter, job).current == 500


def test_state_of_celery_is_a_report_too(platform: Platform, submitter: Submitter) -> None:
    job = submitter.send(BY_STATE, "state", {"current": 3, "total": 10})
    tasks.started(platform.redis, "state")
    assert submitter.result(job).state == "PROGRESS"
    assert submitter.result(job).info == {"current": 3, "total": 10}
    reported = progress(submitter, job)
    assert (reported.current, reported.total) == (3, 10)
    tasks.let_go(platform.redis, "state")
    assert submitter.ended(job).state == "succeeded"
    assert submitter.result(job).state == "SUCCESS"


def test_job_of_a_lost_process_starts_anew(platform: Platform, submitter: Submitter) -> None:
    worker = platform.worker("lost", cpus=1, pool="solo", PLATFORM_RESOURCES="only=1")
    job = submitter.send(REPORT, "lost", [[2, 4]], resources={"only": 1})
    _, pid = tasks.started(platform.redis, "lost")
    assert pid == worker.pid
    assert progress(submitter, job).current == 2
    os.kill(pid, signal.SIGKILL)
    submitter.until(job, "waiting")
    assert progress(submitter, job) is None
    platform.worker("found", cpus=1, pool="solo", PLATFORM_RESOURCES="only=1")
    tasks.started(platform.redis, "lost")
    until(lambda: progress(submitter, job), "the second attempt reports")
    tasks.let_go(platform.redis, "lost")
    assert submitter.ended(job).attempt == 2


def test_call_of_the_task_itself_reports_nothing(submitter: Submitter) -> None:
    statements: list[str] = []
    engine = submitter.app.platform.engine
    event.listen(engine, "before_cursor_execute", lambda *details: statements.append(details[2]))
    reporting.report_at_end(3)
    assert statements == []
