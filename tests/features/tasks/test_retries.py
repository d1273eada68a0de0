"""Retrying: a retry has its job's id, and comes from a running task. A job that waits for its time holds nothing."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from celery import chord
from celery.exceptions import MaxRetriesExceededError

from celery_capacity.routing.config.embedded import Pair
from tests.fixtures.jobs.submitting import Submitter, standing_platform
from tests.fixtures.processes.platforms import Platform, Pool
from tests.fixtures.tasks import add
from tests.fixtures.waiting import until
from tests.tasks.canvas import total
from tests.tasks.retrying import after, by_itself, more_and_more_seldom, with_others, with_priority, without_reason

#: Seconds that are far away for a test.
LATER = 600


@pytest.fixture(scope="module", params=["prefork", "threads"])
def platform(
    request: pytest.FixtureRequest, server_pair: Pair, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Platform]:
    """Yield one worker `a` with 2 CPUs and as many slots."""
    pool: Pool = request.param
    imports = ("tests.tasks.canvas", "tests.tasks.retrying")
    with standing_platform(server_pair, tmp_path_factory.mktemp(pool), *imports) as running:
        running.worker("a", cpus=2, pool=pool)
        yield running


def test_what_waits_for_its_retry_holds_neither_capacity_nor_memory(platform: Platform, submitter: Submitter) -> None:
    jobs = [after.apply_async((LATER,), cpus=2).id for _ in range(5)]
    for job in jobs:
        row = submitter.until(job, "scheduled")
        assert (row.attempt, row.retries) == (1, 1)
        assert timedelta(seconds=LATER - 60) < row.due_at - row.submitted_at < timedelta(seconds=LATER + 60)
        assert submitter.result(job).state == "RETRY"
    assert submitter.allocated_cpus() == "0"
    # All CPUs are free for others, and the worker has no message, timer or request of the waiting jobs.
    assert add.apply_async((1, 1), cpus=2).get(timeout=60) == 2
    inspect = submitter.app.control.inspect(timeout=60, limit=1)
    for answer in (inspect.active(), inspect.reserved(), inspect.scheduled()):
        assert list(answer.values()) == [[]]
    submitter.app.control.revoke(jobs)
    assert {submitter.ended(job).state for job in jobs} == {"cancelled"}


def test_what_a_call_is_given_survives_its_retries(platform: Platform, submitter: Submitter) -> None:
    options = {"cpus": 0.5, "memory": "1MiB", "priority": 7, "headers": {"tenant": "blue"}}
    result = after.apply_async((0, 2), **options)
    assert result.get(timeout=60) == {"id": result.id, "attempt": 3, "retries": 2, "tenant": "blue", "priority": 7}
    row = submitter.ended(result.id)
    assert (row.request, row.priority) == ({"cpus": 0.5, "memory": 2**20, "slots": 1}, 7)
    assert submitter.outcomes(result.id) == ["retried", "retried", "succeeded"]


def test_a_retry_may_have_other_arguments_and_ask_for_more(platform: Platform, submitter: Submitter) -> None:
    result = with_others.apply_async((1,), cpus=0.5)
    assert result.get(timeout=60) == 2
    assert submitter.ended(result.id).request == {"cpus": 2, "memory": 2**20, "slots": 1}


def test_retry_of_a_raised_job_has_the_priority_that_its_task_gives(platform: Platform, submitter: Submitter) -> None:
    result = with_priority.apply_async((2,), countdown=LATER, priority=1)
    submitter.until(result.id, "scheduled")
    raised = "UPDATE jobs SET priority = 6, reprioritized = true, due_at = now() WHERE id = %s"
    with platform.engine.begin() as connection:
        connection.exec_driver_sql(raised, (result.id,))
    assert result.get(timeout=60) == 2
    assert submitter.ended(result.id).priority == 2


def test_tasks_that_celery_retries_by_itself(platform: Platform, submitter: Submitter) -> None:
    well = by_itself.delay("passing", 2)
    assert well.get(timeout=60)["retries"] == 2
    for error, times, attempts in (("passing", 9, 4), ("lasting", 9, 1)):
        result = by_itself.delay(error, times)
        with pytest.raises(OSError, match=error):
            result.get(timeout=60)
        assert submitter.ended(result.id).state == "failed"
        assert submitter.outcomes(result.id) == ["retried"] * (attempts - 1) + ["failed"]
    result = without_reason.delay()
    with pytest.raises(MaxRetriesExceededError):
        result.get(timeout=60)
    assert submitter.ended(result.id).state == "failed"
    assert submitter.outcomes(result.id) == ["retried", "retried", "failed"]


def _scheduled(submitter: Submitter, job: str, retries: int) -> Any:
    row = submitter.row(job)
    return row if (row.state, row.retries) == ("scheduled", retries) else None


def test_the_pauses_of_a_backoff_grow(platform: Platform, submitter: Submitter) -> None:
    job = more_and_more_seldom.delay().id
    pauses = []
    for retries in (1, 2):
        row = until(lambda n=retries: _scheduled(submitter, job, n), f"it waits for retry {retries}")  # type: ignore[misc]
        last = submitter.attempts(job)[row.attempt - 1]
        pauses.append((row.due_at - last.started_at).total_seconds())
    submitter.result(job).revoke()
    submitter.ended(job)
    assert pauses[0] >= 1
    assert pauses[1] - pauses[0] > 0.5


def test_a_part_of_a_canvas_that_retries_counts_once(platform: Platform, submitter: Submitter) -> None:
    result = (chord([with_others.s(1), with_others.s(2), add.s(1, 1)], total.s()) | with_others.s()).apply_async()
    assert result.get(timeout=60) == 8
    assert submitter.ended(result.id).state == "succeeded"
    assert submitter.outcomes(result.id) == ["retried", "succeeded"]
