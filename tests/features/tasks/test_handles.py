"""A job by its id, in a program without asyncio: `celery_capacity.job(id)`."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

import celery_capacity
from celery_capacity import InvalidRequest, Job, NotRetried, PlatformError
from celery_capacity.routing.config.embedded import Pair
from tests.fixtures import tasks
from tests.fixtures.jobs.submitting import Submitter, standing_platform
from tests.fixtures.processes.platforms import Platform

ADD, FAIL, HOLD = (f"tests.fixtures.tasks.{name}" for name in ("add", "fail", "hold"))
SILENT, SILENT_FAILURE = (f"tests.tasks.bodies.{name}" for name in ("silent", "silent_failure"))
MODULES = ("tests.tasks.canvas", "tests.tasks.bodies")
#: Seconds that no test comes near.
LONG = 30.0


@pytest.fixture(scope="module")
def platform(server_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    with standing_platform(server_pair, tmp_path_factory.mktemp("handles"), *MODULES) as running:
        running.worker("a", cpus=2, pool="threads", slots=4)
        yield running


def handle(submitter: Submitter, job: str) -> Job:
    return celery_capacity.job(job, app=submitter.app)


def test_info_says_where_a_job_is_and_why_it_waits(submitter: Submitter, platform: Platform) -> None:
    first = handle(submitter, submitter.send(HOLD, "info", cpus=2))
    tasks.started(platform.redis, "info")
    second, third = (handle(submitter, submitter.send(ADD, 1, 2, cpus=2)) for _ in range(2))
    submitter.until(first.id, "running")
    running = first.info()
    assert (running.state, running.worker, running.reason, running.place) == ("running", "a", None, None)
    assert running.started_at is not None
    assert (running.task, running.request["cpus"], running.final) == (HOLD, 2, False)
    waiting = third.info()
    assert (waiting.reason, waiting.place, waiting.before, waiting.worker) == ("no-room", 2, 1, None)
    tasks.let_go(platform.redis, "info")
    assert third.result(timeout=LONG) == 3
    submitter.ended(third.id)
    ended = asyncio.run(third.aio.info())
    assert (ended.state, ended.final, ended.worker) == ("succeeded", True, "a")
    assert second.wait(timeout=LONG).state == "succeeded"


def test_wait_returns_when_the_state_comes(submitter: Submitter, platform: Platform) -> None:
    job = handle(submitter, submitter.send(HOLD, "wait", cpus=1))
    assert job.wait("running", timeout=LONG).state == "running"
    with pytest.raises(TimeoutError):
        job.wait(timeout=0.05)
    with pytest.raises(TimeoutError):
        job.result(timeout=0.05)
    threading.Timer(0.1, tasks.let_go, (platform.redis, "wait")).start()
    assert [event.state for event in job.events(LONG)][-1] == "succeeded"
    assert asyncio.run(job.aio.result(timeout=LONG)) == "a"
    assert job.now().final


def test_result_raises_the_error_of_a_failed_job(submitter: Submitter) -> None:
    job = handle(submitter, submitter.send(FAIL, "no such disk"))
    with pytest.raises(ValueError, match="no such disk"):
        job.result(timeout=LONG)


def test_cancel_says_what_became_of_the_job(submitter: Submitter, platform: Platform) -> None:
    scheduled = handle(submitter, submitter.send(ADD, 1, 2, countdown=3600))
    assert (scheduled.cancel().became, scheduled.now().state) == ("cancelled", "cancelled")
    assert scheduled.cancel().became == "ended-before"
    running = handle(submitter, submitter.send(HOLD, "cancel", cpus=1))
    tasks.started(platform.redis, "cancel")
    kept = running.cancel()
    assert (kept.became, kept.worker) == ("runs-on", "a")
    # A thread cannot be ended, and the worker says so.
    assert asyncio.run(running.aio.cancel(terminate=True)).became == "cannot-terminate"
    tasks.let_go(platform.redis, "cancel")
    assert running.wait(timeout=LONG).state == "succeeded"


def test_retry_is_a_new_job_linked_to_the_old(submitter: Submitter) -> None:
    old = handle(submitter, submitter.send(FAIL, "again", cpus=1.5, priority=7, queue="celery"))
    assert old.wait(timeout=LONG).state == "failed"
    submitter.ended(old.id)
    new = old.retry()
    assert new.wait(timeout=LONG).state == "failed"
    first, second = submitter.row(old.id), submitter.row(new.id)
    for column in ("name", "request", "shape", "priority", "queue", "declared", "rerun"):
        assert getattr(first, column) == getattr(second, column)
    assert (new.info().retry_of, list(old.info().retried_as)) == (old.id, [new.id])
    with pytest.raises(ValueError, match="again"):
        new.result(timeout=LONG)
    with pytest.raises(NotRetried, match=f"was retried already, as {new.id}"):
        old.retry()
    other = asyncio.run(old.aio.retry(again=True))
    assert list(old.info().retried_as) == [new.id, other.id]


def test_unknown_job_is_refused(submitter: Submitter) -> None:
    for act in ("now", "info", "wait", "cancel", "retry"):
        with pytest.raises(InvalidRequest, match="there is no job nobody"):
            getattr(handle(submitter, "nobody"), act)()
    with pytest.raises(InvalidRequest, match="timeout=30"):
        handle(submitter, "nobody").wait(30)  # type: ignore[arg-type]


def test_result_is_none_for_a_task_that_keeps_none(submitter: Submitter) -> None:
    job = handle(submitter, submitter.send(SILENT, 1))
    assert job.result(timeout=LONG) is None
    assert asyncio.run(job.aio.result(timeout=LONG)) is None


def test_result_raises_the_error_of_a_failed_job_that_keeps_none(submitter: Submitter) -> None:
    job = handle(submitter, submitter.send(SILENT_FAILURE))
    with pytest.raises(PlatformError, match=r"ended as failed: .*nobody hears of it"):
        job.result(timeout=LONG)


def test_result_refuses_an_unknown_id(submitter: Submitter) -> None:
    with pytest.raises(InvalidRequest, match="there is no job nobody"):
        handle(submitter, "nobody").result(timeout=1)
