"""A job goes on with the successor that its attempt published under its id, whichever store knew of it, and when."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from celery_capacity.routing.database.authority import read_authority
from celery_capacity.routing.insert import replacements, single, successors
from celery_capacity.routing.ledger import keys
from celery_capacity.routing.model import outbox
from celery_capacity.routing.model.job import NewJob
from celery_capacity.routing.model.outbox import Outbox
from celery_capacity.routing.model.request import Request
from celery_capacity.routing.model.states import State
from celery_capacity.routing.model.token import Token
from celery_capacity.routing.recovery import resubmit, transition_log
from celery_capacity.routing.store import backlog, claims
from tests.fixtures.stores.staged import MESSAGE, Stage

ONE = Request.of({"cpus": 1000}).shape
#: The message of a successor that is published later.
LATER = b'{"body":"later","properties":{"a":1}}'


@pytest.fixture
def stage(stage: Stage) -> Stage:
    stage.worker("a", cpus=4000)
    return stage


def publish(stage: Stage, job: str, retries: int = 0, nesting: int = 0) -> None:
    """Publish as an attempt does while the ledger is left alone, by a breaker for example.

    Postgres alone hears of it.
    """
    successor = NewJob(job, "task", ONE, MESSAGE, publisher=1, retries=retries, nesting=nesting)
    with stage.engine.connect() as connection:
        assert successors.put_successor(connection, successor) == "running"


@pytest.mark.parametrize(
    ("outcome", "identity"),
    [("succeeded", {"nesting": 1}), ("retried", {"retries": 1}), ("lost", {"retries": 1}), ("failed", {"retries": 1})],
)
def test_a_successor_of_which_the_ledger_was_not_told_starts_at_once(
    stage: Stage, outcome: str, identity: dict[str, int]
) -> None:
    job = stage.insert({"cpus": 1000})
    stage.ledger.submit(job, ONE, 1, MESSAGE, rerun=False)
    stage.apply()
    stage.start(job)
    publish(stage, job, **identity)
    stage.end(job, outcome, applied=False)
    _, applied = transition_log.apply_all(stage.engine, stage.ledger)
    resubmit.go_on(stage.engine, stage.ledger, applied)
    stage.apply()
    row = stage.row(job)
    assert (row.state, row.attempt, row.retries + row.nesting) == ("admitted", 2, 1)


@pytest.mark.parametrize("given", [False, True])
def test_retry_of_a_raised_job_has_the_priority_that_its_task_gives(stage: Stage, given: bool) -> None:
    job = stage.submit(cpus=1000)
    stage.start(job)
    stage.sql("UPDATE jobs SET priority = 6, reprioritized = true WHERE id = :id", id=job)
    retry = NewJob(job, "task", ONE, MESSAGE, publisher=1, retries=1, priority=2, priority_given=given)
    with stage.engine.connect() as connection:
        successors.put_successor(connection, retry)
    stage.end(job, "retried")
    row = stage.row(job)
    assert (row.priority, row.reprioritized) == ((2, False) if given else (6, True))


def test_retry_revoked_on_its_way_to_the_ledger_is_not_taken_there(stage: Stage) -> None:
    job = stage.submit(cpus=1000)
    stage.start(job)
    publish(stage, job, retries=1)
    stage.end(job, "retried")
    assert stage.ledger.cancel(job, State.CANCELLED).verdict == "missing"
    assert stage.ledger.submit(job, ONE, 1, MESSAGE, attempt=1).state == "exists"


def test_a_job_that_was_revoked_while_it_ran_is_not_submitted_again(stage: Stage) -> None:
    job = stage.submit(cpus=1000)
    stage.start(job)
    stage.end(job, "cancelled")
    for attempt in (0, 1):
        assert stage.ledger.submit(job, ONE, 1, MESSAGE, attempt=attempt).state == "exists"


# -- replaced by more than one task: the id goes to the last step, which comes later


def step(stage: Stage, job: str, replaces: str) -> str:
    """Publish and start a step of a replacement, and return its id."""
    with stage.engine.connect() as connection:
        single.insert_job(connection, NewJob(job, "step", ONE, MESSAGE, replaces=replaces))
    stage.ledger.submit(job, ONE, 1, MESSAGE)
    stage.apply()
    stage.start(job)
    return job


def replaced(stage: Stage) -> str:
    job = stage.submit(cpus=1000)
    stage.start(job)
    stage.end(job, "replaced")
    assert stage.row(job).state == "replaced"
    return job


def last_step(stage: Stage, job: str, due_at: datetime | None = None) -> str | None:
    """Publish the step that carries the id on, and return the state of the row then."""
    new = NewJob(job, "task", ONE, LATER, nesting=1, priority=3, due_at=due_at)
    with stage.engine.connect() as connection:
        return successors.put_successor(connection, new)


@pytest.mark.parametrize("remembered", [True, False])
def test_a_replaced_job_goes_on_with_its_last_step(stage: Stage, remembered: bool) -> None:
    job = replaced(stage)
    assert stage.redis.get(keys.ALLOCATED_CPUS) == b"0"
    if not remembered:
        # A minute later the ledger has forgotten it.
        stage.redis.delete(keys.job(job))
    assert last_step(stage, job) == "replaced"
    assert last_step(stage, job) is None
    with stage.engine.connect() as connection:
        (row,) = backlog.these(connection, [job])
    assert (bytes(row.message), row.attempt, row.priority) == (LATER, 1, 3)
    assert resubmit.submit_rows(stage.ledger, [row]) == 1
    stage.apply()
    row = stage.row(job)
    assert (row.state, row.attempt, row.nesting, row.successor) == ("admitted", 2, 1, None)


def test_a_last_step_for_later_is_scheduled(stage: Stage) -> None:
    job = replaced(stage)
    assert last_step(stage, job, datetime.now(UTC) + timedelta(hours=1)) == "replaced"
    row = stage.row(job)
    assert (row.state, row.due_at > datetime.now(UTC), row.successor) == ("scheduled", True, None)


def test_a_last_step_may_come_before_the_end_of_the_attempt(stage: Stage) -> None:
    job = stage.submit(cpus=1000)
    stage.start(job)
    assert last_step(stage, job) == "running"
    stage.end(job, "replaced", applied=False)
    _, applied = transition_log.apply_all(stage.engine, stage.ledger)
    resubmit.go_on(stage.engine, stage.ledger, applied)
    stage.apply()
    row = stage.row(job)
    assert (row.state, row.attempt, row.nesting, bytes(row.message)) == ("admitted", 2, 1, LATER)


def test_a_row_that_is_behind_does_not_go_on_by_itself(stage: Stage) -> None:
    """The attempt runs already, and Postgres has not heard of it."""
    job = stage.submit(cpus=1000, applied=False)
    assert last_step(stage, job) == "accepted"
    row = stage.row(job)
    assert (bytes(row.message), bytes(row.successor)) == (MESSAGE, LATER)


def test_publish_left_by_an_attempt_continues_a_replaced_job(stage: Stage) -> None:
    """A step that ran while Postgres was away publishes with its end, for example."""
    job = replaced(stage)
    box = Outbox(publishes=[NewJob(job, "task", ONE, LATER, nesting=1)]).to_text()
    with stage.engine.connect() as connection:
        assert successors.publish_left(connection, box) == [job]
    assert stage.row(job).state == "accepted"


@pytest.mark.parametrize("outcome", ["failed", "cancelled", "expired", "succeeded"])
def test_a_replaced_job_ends_with_the_last_of_its_steps(stage: Stage, outcome: str) -> None:
    job = replaced(stage)
    first, second = step(stage, "first", job), step(stage, "second", job)
    stage.end(first, outcome)
    row = stage.row(job)
    assert (row.state, row.finished_at) == ("replaced", None)
    stage.end(second)
    if outcome in ("cancelled", "expired"):
        # It has a result to be told, which may publish something.
        assert stage.row(job).state == "replaced"
        stage.sql("UPDATE jobs SET outbox = NULL WHERE id = 'first'")
    with stage.engine.connect() as connection:
        replacements.end_abandoned(connection)
    row = stage.row(job)
    assert row.state == (outcome if outcome != "succeeded" else "failed")
    assert row.error == (
        f"its replacement ended without it: job first (step) is {outcome}"
        if outcome != "succeeded"
        else replacements.NO_STEP
    )
    assert (row.finished_at is not None, row.outbox) == (True, outbox.UNLESS_TOLD)
    # It has ended: a step that carries the id on comes too late.
    assert last_step(stage, job) is None


def test_a_step_that_fails_last_ends_the_replaced_job_at_once(stage: Stage) -> None:
    job = replaced(stage)
    stage.end(step(stage, "first", job), "failed")
    assert stage.row(job).state == "failed"


def test_the_replacement_of_a_step_keeps_the_job_alive(stage: Stage) -> None:
    job = replaced(stage)
    stage.end(step(stage, "inner", job), "replaced")
    stage.end(step(stage, "first", "inner"), "failed")
    assert (stage.row("inner").state, stage.row(job).state) == ("failed", "replaced")
    # Its result is told first, and perhaps with it something is published.
    stage.sql("UPDATE jobs SET outbox = NULL WHERE id = 'inner'")
    with stage.engine.connect() as connection:
        assert replacements.end_abandoned(connection, [job]) == [job]
        assert replacements.end_abandoned(connection, [job]) == []


def test_a_replaced_job_goes_on_while_postgres_decides(stage: Stage) -> None:
    job = replaced(stage)
    stage.sql("UPDATE authority SET authority = 'postgres', epoch = epoch + 1")
    assert last_step(stage, job) == "replaced"
    with stage.engine.connect() as connection:
        epoch = read_authority(connection).epoch
        (taken,) = claims.take(connection, epoch, "a", "a-life", [job])
    assert (taken.token, "later" in taken.message) == (Token(epoch, 2), True)
    assert stage.row(job).state == "running"
