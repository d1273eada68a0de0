"""The life of one job on every pool: each way to begin, to end and to come again.

After each test the fixture `books` checks that the books are at rest, so every one of these ways releases its
allocation.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from celery.exceptions import TaskRevokedError, TimeLimitExceeded

from celery_capacity.routing.config.embedded import Pair
from celery_capacity.routing.errors import InvalidRequest
from tests.fixtures import tasks
from tests.fixtures.jobs.submitting import Submitter, standing_platform
from tests.fixtures.processes.platforms import Platform, Pool
from tests.fixtures.waiting import until

ENDS = "tests.tasks.ends"
HOLD = "tests.fixtures.tasks.hold"

#: Mark of tests that kill a pool process, which only a pool with its own processes allows.
prefork_only = pytest.mark.parametrize("pool", ["prefork"], indirect=True)

#: Mark of tests in which no pool has a part: the job does not start, or its start shows nothing of the pool.
any_pool = pytest.mark.parametrize("pool", ["threads"], indirect=True)


@pytest.fixture(scope="module", params=["prefork", "threads", "solo"])
def pool(request: pytest.FixtureRequest) -> Pool:
    pool_name: Pool = request.param
    return pool_name


@pytest.fixture(scope="module")
def platform(pool: Pool, server_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """Yield a platform with one worker `a` of 4 CPUs, and as many slots as its pool can have."""
    with standing_platform(server_pair, tmp_path_factory.mktemp(pool), ENDS) as running:
        running.worker("a", cpus=4, pool=pool)
        yield running


@pytest.fixture
def full(platform: Platform, submitter: Submitter) -> Iterator[str]:
    """Yield the id of a job that fills the worker until the end of the test."""
    gate = "full"
    job = submitter.send(HOLD, gate, cpus=4)
    tasks.started(platform.redis, gate)
    yield job
    tasks.let_go(platform.redis, gate)
    assert submitter.ended(job).state == "succeeded"


# -- ends


def test_a_job_that_returns_succeeds_with_its_result(submitter: Submitter) -> None:
    job = submitter.send("tests.fixtures.tasks.add", 40, 2, cpus=2, memory="1GiB")
    assert submitter.value(job) == 42
    row = submitter.ended(job)
    assert (row.state, row.worker, row.attempt, row.error) == ("succeeded", "a", 1, None)
    assert row.request == {"cpus": 2, "memory": 2**30, "slots": 1}
    assert row.submitted_at <= row.admitted_at <= row.started_at <= row.finished_at
    (attempt,) = submitter.attempts(job)
    assert (attempt.worker, attempt.outcome, attempt.attempt) == ("a", "succeeded", 1)
    assert attempt.incarnation == row.incarnation
    assert submitter.allocated_cpus() == "0"


def test_a_job_that_raises_fails_with_the_error_in_its_row(submitter: Submitter) -> None:
    job = submitter.send("tests.fixtures.tasks.fail", "the disk is full")
    with pytest.raises(ValueError, match="the disk is full"):
        submitter.value(job)
    row = submitter.ended(job)
    assert row.state == "failed"
    assert "ValueError('the disk is full')" in row.error
    assert "Traceback" in row.error
    (attempt,) = submitter.attempts(job)
    assert attempt.outcome == "failed"
    assert "the disk is full" in attempt.error


@pytest.mark.parametrize("text", ["zero \0 byte", "half a pair \udcff", "ü 🦀 漢", "x" * 100_000], ids=ascii)
def test_an_error_of_any_text_is_kept(submitter: Submitter, text: str) -> None:
    job = submitter.send("tests.fixtures.tasks.fail", text)
    row = submitter.ended(job)
    assert row.state == "failed"
    assert text.partition(" ")[0][:100] in row.error
    assert len(row.error) < 10_000
    assert submitter.value(submitter.send("tests.fixtures.tasks.add", 1, 1)) == 2


def test_a_task_sees_its_attempt(submitter: Submitter) -> None:
    job = submitter.send(f"{ENDS}.seen")
    assert submitter.value(job) == {"id": job, "attempt": 1, "retries": 0}


def test_a_result_that_json_cannot_hold_fails_the_job(submitter: Submitter) -> None:
    job = submitter.send(f"{ENDS}.unreturnable")
    assert "not JSON serializable" in submitter.ended(job).error
    assert submitter.outcomes(job) == ["failed"]


def test_the_result_is_kept_apart_from_the_job_where_it_is_ignored(submitter: Submitter) -> None:
    job = submitter.send("tests.fixtures.tasks.add", 1, 1, ignore_result=True)
    assert submitter.ended(job).state == "succeeded"
    assert submitter.result(job).state == "PENDING"


# -- again


def test_a_retry_at_once_is_a_new_attempt_under_the_same_id(submitter: Submitter) -> None:
    job = submitter.send(f"{ENDS}.again", 2, cpus=3)
    assert submitter.value(job) == {"id": job, "attempt": 3, "retries": 2}
    row = submitter.ended(job)
    assert (row.state, row.attempt, row.retries, row.losses) == ("succeeded", 3, 2, 0)
    attempts = submitter.attempts(job)
    assert [attempt.outcome for attempt in attempts] == ["retried", "retried", "succeeded"]
    assert [attempt.attempt for attempt in attempts] == [1, 2, 3]
    assert "retry 0" in attempts[0].error
    assert row.request == {"cpus": 3, "slots": 1}


def test_a_retry_that_comes_later_is_scheduled_and_holds_nothing_meanwhile(submitter: Submitter) -> None:
    job = submitter.send(f"{ENDS}.again", 1, 1.0)
    between = submitter.until(job, "scheduled")
    assert submitter.allocated_cpus() == "0"
    first = submitter.attempts(job)[0]
    assert first.outcome == "retried"
    assert timedelta(0) < between.due_at - first.started_at
    assert submitter.value(job)["attempt"] == 2
    row = submitter.ended(job)
    assert row.started_at >= between.due_at
    assert submitter.outcomes(job) == ["retried", "succeeded"]


def test_a_job_that_retries_too_often_fails(submitter: Submitter) -> None:
    job = submitter.send(f"{ENDS}.never_well", 2)
    with pytest.raises(ValueError, match="never well"):
        submitter.value(job)
    assert submitter.ended(job).state == "failed"
    assert submitter.outcomes(job) == ["retried", "retried", "failed"]


@pytest.mark.parametrize("how", ["returns", "fails"])
def test_a_retry_that_was_published_runs_however_its_attempt_ends(submitter: Submitter, how: str) -> None:
    job = submitter.send(f"{ENDS}.again_and_more", how)
    row = submitter.until(job, "succeeded")
    assert (row.attempt, row.retries) == (2, 1)
    first, second = submitter.outcomes(job)
    assert (first, second) == ("succeeded" if how == "returns" else "failed", "succeeded")


@prefork_only
def test_a_retry_that_was_published_runs_also_when_its_process_dies(submitter: Submitter) -> None:
    job = submitter.send(f"{ENDS}.again_and_more", "dies")
    row = submitter.until(job, "succeeded")
    assert (row.attempt, row.retries, row.losses) == (2, 1, 1)
    assert submitter.outcomes(job) == ["lost", "succeeded"]


def test_the_request_of_the_call_survives_a_retry(submitter: Submitter) -> None:
    job = submitter.send(f"{ENDS}.again", 1, cpus=0.5, memory="512MiB")
    assert submitter.value(job)["retries"] == 1
    assert submitter.ended(job).request == {"cpus": 0.5, "memory": 512 * 2**20, "slots": 1}


# -- later, and too late


@any_pool
@pytest.mark.parametrize("how", ["countdown", "eta"])
def test_a_job_for_later_is_scheduled_and_starts_after_its_time(submitter: Submitter, how: str) -> None:
    before, later = datetime.now(UTC), 2.0
    when = {"countdown": later} if how == "countdown" else {"eta": before + timedelta(seconds=later)}
    job = submitter.send(f"{ENDS}.seen", **when)
    row = submitter.row(job)
    assert (row.state, row.attempt) == ("scheduled", 0)
    assert row.due_at >= before + timedelta(seconds=later)
    assert submitter.value(job)["attempt"] == 1
    ended = submitter.ended(job)
    assert (ended.state, ended.due_at) == ("succeeded", row.due_at)
    assert ended.started_at >= row.due_at


@any_pool
def test_a_job_that_waits_past_its_expiry_expires_and_never_runs(full: str, submitter: Submitter) -> None:
    job = submitter.send(f"{ENDS}.seen", expires=0.5)
    assert submitter.row(job).expires_at is not None
    row = submitter.ended(job)
    assert (row.state, row.attempt, row.started_at, row.error) == ("expired", 0, None, "expired")
    assert until(lambda: submitter.result(job).state == "REVOKED", "its result is REVOKED")
    with pytest.raises(TaskRevokedError, match="expired"):
        submitter.value(job)
    assert submitter.attempts(job) == []


@any_pool
def test_a_scheduled_job_expires_before_its_time(submitter: Submitter) -> None:
    job = submitter.send(f"{ENDS}.seen", countdown=60, expires=0.3)
    assert submitter.ended(job).state == "expired"


@any_pool
def test_a_job_that_starts_in_time_does_not_expire(submitter: Submitter) -> None:
    job = submitter.send(f"{ENDS}.seen", expires=60)
    assert submitter.value(job)["attempt"] == 1
    assert submitter.ended(job).state == "succeeded"


@any_pool
@pytest.mark.parametrize("options", [{"eta": datetime(2020, 1, 1, tzinfo=UTC)}, {"countdown": 0}, {"countdown": -5}])
def test_a_time_that_is_past_delays_nothing(submitter: Submitter, options: dict[str, Any]) -> None:
    job = submitter.send(f"{ENDS}.seen", **options)
    assert submitter.value(job)["attempt"] == 1
    assert submitter.ended(job).state == "succeeded"


@any_pool
def test_a_job_that_is_sent_past_its_expiry_expires(submitter: Submitter) -> None:
    job = submitter.send(f"{ENDS}.seen", expires=datetime.now(UTC) - timedelta(seconds=1))
    assert submitter.ended(job).state == "expired"
    assert until(lambda: submitter.result(job).state == "REVOKED", "its result is REVOKED")


# -- revoked


@any_pool
def test_a_waiting_job_that_is_revoked_never_runs(full: str, submitter: Submitter) -> None:
    job = submitter.send(f"{ENDS}.seen")
    assert submitter.until(job, "waiting", "accepted").attempt == 0
    submitter.result(job).revoke()
    row = submitter.ended(job)
    assert (row.state, row.attempt, row.error) == ("cancelled", 0, "revoked")
    with pytest.raises(TaskRevokedError):
        submitter.value(job)
    assert submitter.attempts(job) == []


@any_pool
def test_a_scheduled_job_that_is_revoked_never_runs(submitter: Submitter) -> None:
    job = submitter.send(f"{ENDS}.seen", countdown=60)
    submitter.result(job).revoke()
    assert submitter.ended(job).state == "cancelled"
    # A worker's sweep may have ended it first. Then the result follows the row.
    with pytest.raises(TaskRevokedError):
        submitter.value(job)
    assert submitter.result(job).state == "REVOKED"


@any_pool
def test_a_job_that_nobody_knows_is_revoked_without_an_error(submitter: Submitter) -> None:
    submitter.app.control.revoke("nobody-knows-this")
    assert submitter.row("nobody-knows-this") is None


@any_pool
def test_several_jobs_are_revoked_at_once(full: str, submitter: Submitter) -> None:
    jobs = [submitter.send(f"{ENDS}.seen") for _ in range(3)]
    submitter.app.control.revoke(jobs)
    assert {submitter.ended(job).state for job in jobs} == {"cancelled"}


def test_a_running_job_is_not_ended_by_a_revoke_alone(platform: Platform, submitter: Submitter) -> None:
    job = submitter.send(HOLD, "kept")
    tasks.started(platform.redis, "kept")
    submitter.result(job).revoke()
    tasks.let_go(platform.redis, "kept")
    assert submitter.ended(job).state == "succeeded"


@any_pool
def test_an_ended_job_is_not_ended_again_by_a_revoke(submitter: Submitter) -> None:
    job = submitter.send(f"{ENDS}.seen")
    value = submitter.value(job)
    ended = submitter.ended(job)
    submitter.result(job).revoke()
    assert submitter.row(job) == ended
    assert submitter.result(job).get(timeout=1) == value


@prefork_only
def test_a_running_job_is_terminated(platform: Platform, submitter: Submitter) -> None:
    job = submitter.send(HOLD, "terminated", cpus=4)
    tasks.started(platform.redis, "terminated")
    submitter.result(job).revoke(terminate=True)
    row = submitter.ended(job)
    assert (row.state, row.attempt) == ("cancelled", 1)
    assert submitter.outcomes(job) == ["cancelled"]
    with pytest.raises(TaskRevokedError, match="terminated"):
        submitter.value(job)
    assert submitter.allocated_cpus() == "0"
    assert submitter.value(submitter.send("tests.fixtures.tasks.add", 1, 1, cpus=4)) == 2


# -- limits and other violent ends


@prefork_only
def test_a_job_over_its_hard_limit_fails_and_releases(submitter: Submitter) -> None:
    job = submitter.send(HOLD, "too long", cpus=4, time_limit=1)
    with pytest.raises(TimeLimitExceeded):
        submitter.value(job)
    row = submitter.ended(job)
    assert row.state == "failed"
    assert "TimeLimitExceeded(1" in row.error
    assert submitter.outcomes(job) == ["failed"]
    assert submitter.value(submitter.send("tests.fixtures.tasks.add", 1, 1, cpus=4)) == 2


@prefork_only
def test_a_job_over_its_soft_limit_fails_with_that(submitter: Submitter) -> None:
    job = submitter.send(HOLD, "a little long", soft_time_limit=1)
    assert "SoftTimeLimitExceeded" in submitter.ended(job).error
    assert submitter.outcomes(job) == ["failed"]


@pytest.mark.parametrize(
    ("task", "arguments", "said"),
    [
        ("out_of_memory", (), "MemoryError('there is no more')"),
        ("leave", (3,), "SystemExit(3)"),
        ("interrupted", (), "KeyboardInterrupt"),
    ],
)
def test_what_would_end_a_process_ends_the_job_alone(
    platform: Platform, submitter: Submitter, task: str, arguments: tuple[int, ...], said: str
) -> None:
    job = submitter.send(f"{ENDS}.{task}", *arguments, cpus=4)
    row = submitter.ended(job)
    assert row.state == "failed"
    assert said in row.error
    assert submitter.outcomes(job) == ["failed"]
    assert until(lambda: submitter.result(job).state == "FAILURE", "its result is FAILURE")
    assert submitter.value(submitter.send("tests.fixtures.tasks.add", 1, 1, cpus=4)) == 2
    assert platform.processes[0].alive


def test_an_exception_that_cannot_be_sent_anywhere_fails_the_job(submitter: Submitter) -> None:
    job = submitter.send(f"{ENDS}.odd", cpus=4)
    row = submitter.ended(job)
    assert row.state == "failed"
    assert "odd 3" in row.error


def test_a_job_that_ignores_itself_is_over(submitter: Submitter) -> None:
    job = submitter.send(f"{ENDS}.ignored", cpus=4)
    assert submitter.ended(job).state == "succeeded"
    assert submitter.result(job).state == "PENDING"


def test_a_job_that_rejects_itself_fails(submitter: Submitter) -> None:
    job = submitter.send(f"{ENDS}.rejected", cpus=4)
    row = submitter.ended(job)
    assert (row.state, row.error) == ("failed", "rejected: unwanted")


def test_a_job_that_rejects_itself_for_another_try_gets_a_new_attempt(submitter: Submitter) -> None:
    job = submitter.send(f"{ENDS}.rejected_once", cpus=4)
    assert submitter.value(job) == 2
    row = submitter.ended(job)
    assert (row.state, row.losses) == ("succeeded", 0)
    assert submitter.outcomes(job) == ["requeued", "succeeded"]


# -- messages that never become a request


def test_a_job_with_arguments_that_the_task_does_not_take_fails(submitter: Submitter) -> None:
    job = submitter.app.send_task("tests.fixtures.tasks.add", [1, 2, 3, 4], cpus=4).id
    assert "TypeError" in submitter.ended(job).error


def test_a_job_in_a_form_that_workers_do_not_accept_is_refused(submitter: Submitter) -> None:
    before = submitter.jobs()
    with pytest.raises(InvalidRequest, match="pickle"):
        submitter.send("tests.fixtures.tasks.add", 1, 1, cpus=4, serializer="pickle")
    assert submitter.jobs() == before
