"""A job goes on with what its attempt published under its id, whoever of the stores knew of that, and when."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import Engine

from routing import accept, enroll, stream
from routing.accept import NewJob
from routing.request import Request
from routing.settings import Settings
from tests.fixtures.staged import MESSAGE, Stage

ONE = Request.of({"cpus": 1000}).shape


@pytest.fixture
def stage(engine: Engine, settings: Settings) -> Iterator[Stage]:
    stage = Stage(engine, settings)
    stage.worker("a", cpus=4000)
    yield stage
    stage.close()


def publish(stage: Stage, job: str, retries: int = 0, nesting: int = 0) -> None:
    """As an attempt does while the ledger is left alone (by a breaker, say): Postgres alone hears of it."""
    successor = NewJob(job, "task", ONE, MESSAGE, publisher=1, retries=retries, nesting=nesting)
    with stage.engine.connect() as connection:
        assert accept.put_successor(connection, successor) == "running"


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
    _, applied = stream.apply_all(stage.engine, stage.ledger)
    enroll.go_on(stage.engine, stage.ledger, applied)
    stage.apply()
    row = stage.row(job)
    assert (row.state, row.attempt, row.retries + row.nesting) == ("admitted", 2, 1)


def test_a_retry_that_was_revoked_on_its_way_to_the_ledger_is_not_taken_there(stage: Stage) -> None:
    job = stage.submit(cpus=1000)
    stage.start(job)
    publish(stage, job, retries=1)
    stage.end(job, "retried")
    assert stage.ledger.cancel(job, "cancelled").verdict == "missing"
    assert stage.ledger.submit(job, ONE, 1, MESSAGE, attempt=1).state == "exists"


def test_a_job_that_was_revoked_while_it_ran_is_not_submitted_again(stage: Stage) -> None:
    job = stage.submit(cpus=1000)
    stage.start(job)
    stage.end(job, "cancelled")
    for attempt in (0, 1):
        assert stage.ledger.submit(job, ONE, 1, MESSAGE, attempt=attempt).state == "exists"
