"""Tasks that a worker has not registered: their jobs wait for a worker that has, and no other worker takes them."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import text

from celery_capacity.routing.inspect import explain, overview
from celery_capacity.routing.ledger import keys
from celery_capacity.routing.model.reasons import Reason
from tests.fixtures.jobs.submitting import Submitter
from tests.fixtures.processes.platforms import Platform
from tests.fixtures.waiting import until

ADD = "tests.fixtures.tasks.add"
#: Environment of a worker that knows only Celery's tasks and `demo.sleep`.
BLIND: dict[str, Any] = {"PLATFORM_IMPORTS": ""}


def states(platform: Platform) -> dict[str, int]:
    with platform.engine.connect() as connection:
        rows = connection.execute(text("SELECT state, count(*) FROM jobs GROUP BY state"))
        return {str(state): int(count) for state, count in rows}


def why(platform: Platform, job: str) -> Reason | None:
    with platform.engine.connect() as connection:
        explanation = explain.explain(platform.redis, connection, job)
    return None if explanation is None else explanation.why


@pytest.mark.parametrize("pool", ["threads", "prefork"])
def test_worker_without_the_code_leaves_the_backlog_alone(platform: Platform, submitter: Submitter, pool: Any) -> None:
    jobs = [submitter.send(ADD, 1, 1, cpus=0.01) for _ in range(200)]
    other = submitter.send("demo.sleep", 0, cpus=0.01)
    platform.worker("blind", 4, pool, **BLIND)
    assert submitter.ended(other).state == "succeeded"
    # Postgres hears a moment later that they wait in the ledger.
    until(lambda: states(platform) == {"succeeded": 1, "waiting": len(jobs)}, lambda: f"{states(platform)}")
    assert why(platform, jobs[0]) is Reason.NO_TASK
    (line,) = overview.from_ledger(platform.redis).backlog
    assert (line.unknown_task, line.waiting) == (ADD, len(jobs))
    shown = platform.celery("cluster").stdout
    assert f"No live worker knows the task {ADD}" in shown
    assert "No live worker knows its task" in platform.celery("job", jobs[0]).stdout
    # A release of the blind worker admits none of them either.
    assert submitter.ended(submitter.send("demo.sleep", 0, cpus=0.01)).state == "succeeded"
    platform.worker("knowing", 4, pool)
    until(lambda: states(platform) == {"succeeded": len(jobs) + 2}, lambda: f"all succeed: {states(platform)}")
    with platform.engine.connect() as connection:
        ran = connection.execute(text("SELECT DISTINCT worker FROM jobs WHERE name = :name"), {"name": ADD})
        assert ran.scalars().all() == ["knowing"]
        assert connection.execute(text("SELECT count(*) FROM attempts")).scalar_one() == len(jobs) + 2


def test_new_tasks_wait_for_new_workers_in_a_rolling_deployment(platform: Platform, submitter: Submitter) -> None:
    platform.worker("old", 4, "threads", **BLIND)
    fresh = [submitter.send(ADD, 1, n, cpus=1) for n in range(8)]
    usual = [submitter.send("demo.sleep", 0.05, cpus=1) for _ in range(8)]
    assert {submitter.ended(job).state for job in usual} == {"succeeded"}
    assert {why(platform, job) for job in fresh} == {Reason.NO_TASK}
    platform.worker("new", 4, "threads")
    assert [submitter.value(job) for job in fresh] == [1 + n for n in range(8)]
    assert {submitter.ended(job).worker for job in fresh} == {"new"}
    # Both take the tasks that both know.
    both = [job.id for job in submitter.app.submit_many("demo.sleep", [(2,)] * 8, cpus=1)]
    assert {submitter.ended(job).worker for job in both} == {"old", "new"}


def test_lost_attempt_goes_back_only_to_a_worker_that_knows_the_task(platform: Platform, submitter: Submitter) -> None:
    short: dict[str, Any] = {"PLATFORM_RENEW_INTERVAL": "0.3", "PLATFORM_WORKER_TTL": "1", "PLATFORM_LOST_AFTER": "2"}
    platform.worker("blind", 4, "threads", **BLIND, **short)
    knowing = platform.worker("knowing", 4, "threads", **short)
    job = submitter.send("tests.fixtures.tasks.hold", "held", cpus=1)
    until(lambda: states(platform) == {"running": 1}, "it runs")
    knowing.kill()
    until(lambda: why(platform, job) is Reason.NO_TASK, lambda: f"it waits again: {states(platform)}")
    until(lambda: submitter.outcomes(job) == ["lost"], lambda: f"it lost an attempt: {submitter.outcomes(job)}")


def test_rows_of_unknown_tasks_wait_where_postgres_decides(platform: Platform, submitter: Submitter) -> None:
    jobs = [submitter.send(ADD, 1, 1, cpus=0.01) for _ in range(20)]
    with platform.engine.begin() as connection:
        connection.execute(text("UPDATE authority SET authority = 'postgres', epoch = epoch + 1, changed_at = now()"))
    platform.worker("blind", 4, "threads", **BLIND)
    assert submitter.ended(submitter.send("demo.sleep", 0, cpus=0.01)).state == "succeeded"
    assert {row.state for row in map(submitter.row, jobs)} <= {"accepted", "waiting"}


def test_job_under_a_name_of_celerys_that_nobody_has_fails(platform: Platform, submitter: Submitter) -> None:
    """No catalogue has Celery's own tasks, so the job would come back to this worker for ever."""
    platform.worker("a", 4, "threads")
    row = submitter.ended(submitter.send("celery.nobody_has_this", cpus=1))
    assert (row.state, row.attempt) == ("failed", 1)
    assert "does not know this task" in row.error


def test_message_of_a_task_that_was_taken_away_is_handed_back(platform: Platform, submitter: Submitter) -> None:
    """The books say that a worker knows a task, and it does not: as from a release that files no tasks."""
    platform.worker("blind", 4, "threads", **BLIND)
    (catalogue,) = platform.redis.scan_iter(keys.tasks("*"))
    platform.redis.sadd(catalogue, ADD)
    job = submitter.send(ADD, 1, 1, cpus=1)
    until(lambda: "handed_back" in submitter.outcomes(job), lambda: f"it goes back: {submitter.outcomes(job)}")
    platform.redis.srem(catalogue, ADD)
    until(lambda: why(platform, job) is Reason.NO_TASK, "it waits")
    until(lambda: submitter.row(job).state == "waiting", lambda: f"its row says so: {submitter.row(job).state}")
    platform.worker("knowing", 4, "threads")
    assert submitter.value(job) == 2
