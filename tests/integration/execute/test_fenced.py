"""`fenced`: a task's own rows and the end of its job are committed together, or not at all."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session

from celery_capacity import InvalidRequest, LeaseLost, PlatformError, fenced
from celery_capacity.routing.config.embedded import Pair
from celery_capacity.routing.ledger import keys
from celery_capacity.routing.model.message import Tag
from celery_capacity.routing.model.states import Step
from celery_capacity.routing.model.token import Token
from celery_capacity.workers.process.attempts import Attempt, held
from tests.fixtures import tasks
from tests.fixtures.jobs.leasing import ADD, HOLD, LEAVE, at_gate, counters, effects, outcomes, platform_with_effects
from tests.fixtures.jobs.submitting import Submitter
from tests.fixtures.processes.platforms import Platform, Pool, Process
from tests.fixtures.servers.pair import empty_database
from tests.fixtures.waiting import until
from tests.tasks.effects import TABLE


@pytest.fixture
def platform(server_pair: Pair, tmp_path: Path) -> Iterator[Platform]:
    with platform_with_effects(server_pair, tmp_path) as running:
        yield running


# -- effects that come about once


def test_what_a_task_leaves_is_committed_with_the_end_of_its_job(platform: Platform, submitter: Submitter) -> None:
    platform.worker("a", cpus=2)
    platform.worker("b", cpus=2, pool="threads")
    for _ in range(4):
        job = submitter.send(LEAVE)
        assert submitter.value(job) == "attempt 1"
        row = submitter.ended(job)
        assert (row.state, row.attempt, row.error) == ("succeeded", 1, None)
        assert effects(platform, job) == [1]
        until(lambda: submitter.row(job).step == Step.ENDED, "its worker has said so too")  # noqa: B023
        outcomes(submitter, job, "succeeded")
        assert submitter.attempts(job)[0].started_at is not None


def test_an_exception_in_the_block_leaves_nothing(platform: Platform, submitter: Submitter) -> None:
    platform.worker("a", cpus=2)
    job = submitter.send(LEAVE, "raises")
    with pytest.raises(ValueError, match="in the block"):
        submitter.value(job)
    assert submitter.ended(job).state == "failed"
    assert effects(platform, job) == []


def test_exception_after_the_block_changes_neither_effect_nor_end(platform: Platform, submitter: Submitter) -> None:
    platform.worker("a", cpus=2)
    job = submitter.send(LEAVE, "raises after")
    # The job has succeeded, so nobody hears of a failure. Its return value is unknown.
    assert submitter.value(job) is None
    row = submitter.ended(job)
    until(lambda: submitter.row(job).step == Step.ENDED, "its worker has said so too")
    assert (submitter.row(job).state, effects(platform, job), row.losses) == ("succeeded", [1], 0)
    outcomes(submitter, job, "succeeded")


def test_a_second_block_in_an_attempt_is_refused_and_the_first_one_stands(
    platform: Platform, submitter: Submitter
) -> None:
    worker = platform.worker("a", cpus=2)
    job = submitter.send(LEAVE, "twice")
    worker.wait_for("cannot end its job once more")
    assert submitter.value(job) is None
    until(lambda: submitter.row(job).step == Step.ENDED, "its worker has said so too")
    assert (submitter.row(job).state, effects(platform, job)) == ("succeeded", [1])


def test_a_process_that_dies_after_its_commit_is_not_started_again(platform: Platform, submitter: Submitter) -> None:
    platform.worker("a", cpus=2)
    job = submitter.send(LEAVE, "dies after")
    row = submitter.ended(job)
    assert (row.state, row.attempt) == ("succeeded", 1)
    # The return value died with the worker.
    assert submitter.value(job) is None
    until(lambda: submitter.allocated_cpus() == "0", "its allocation is free")
    assert (effects(platform, job), submitter.row(job).losses) == ([1], 0)
    outcomes(submitter, job, "succeeded")


def test_committed_job_of_a_worker_that_died_is_not_started_again(platform: Platform, submitter: Submitter) -> None:
    killed = platform.worker("a", cpus=2)
    job = submitter.send(LEAVE, "held after", "gate")
    at_gate(platform, "gate", job)
    assert submitter.row(job).state == "succeeded"
    # A repair in between leaves the job alone: the body goes on.
    assert platform.celery("reconcile").returncode == 0
    assert submitter.allocated_cpus() == "1"
    killed.kill()
    platform.worker("b", cpus=2)
    until(lambda: submitter.allocated_cpus() == "0", "its allocation is free")
    assert submitter.value(job) is None
    assert (submitter.row(job).attempt, effects(platform, job)) == (1, [1])
    outcomes(submitter, job, "succeeded")


def test_a_value_that_was_stored_before_its_worker_died_stays(platform: Platform, submitter: Submitter) -> None:
    """The release stored the value, and its transition was lost: Postgres knows the job's end, but not its value."""
    killed = platform.worker("a", cpus=2)
    job = submitter.send(LEAVE, "held after", "gate")
    at_gate(platform, "gate", job)
    submitter.app.backend.store_result(job, "attempt 1", "SUCCESS")
    killed.kill()
    platform.worker("b", cpus=2, pool="threads")
    until(lambda: submitter.row(job).step == Step.ENDED and submitter.row(job).outbox is None, "all was told")
    assert submitter.value(job) == "attempt 1"
    assert (submitter.row(job).attempt, effects(platform, job)) == (1, [1])


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_worker_that_is_stopped_after_a_commit_hands_nothing_back(
    platform: Platform, submitter: Submitter, pool: Pool
) -> None:
    ended = platform.worker("a", cpus=2, pool=pool)
    job = submitter.send(LEAVE, "held after", "gate")
    at_gate(platform, "gate", job)
    platform.worker("b", cpus=2)
    ended.signal(signal.SIGQUIT)
    if pool == "threads":
        # Nothing interrupts a thread. The process ends after its thread, and has the thread's value.
        ended.wait_for("terminate all running tasks")
        tasks.let_go(platform.redis, "gate")
    ended.wait()
    assert submitter.value(job) == ("attempt 1" if pool == "threads" else None)
    until(lambda: submitter.allocated_cpus() == "0", "its allocation is free")
    assert (submitter.row(job).attempt, effects(platform, job)) == (1, [1])
    outcomes(submitter, job, "succeeded")


def test_worker_that_wakes_up_too_late_leaves_no_second_effect(
    platform: Platform, submitter: Submitter, stopped: Process
) -> None:
    job = submitter.send(LEAVE, "held in", "gate")
    at_gate(platform, "gate", job)
    os.killpg(stopped.pid, signal.SIGSTOP)
    platform.worker("b", cpus=2)
    # The next attempt is on the other worker. It is still in the block when the first attempt wakes up and leaves its
    # own.
    at_gate(platform, "gate", job)
    row = until(lambda: (latest := submitter.row(job)).attempt == 2 and latest, "attempt 2 is in the row")
    assert (row.worker, row.losses) == ("b", 1)
    os.killpg(stopped.pid, signal.SIGCONT)
    tasks.let_go(platform.redis, "gate", 2)
    assert submitter.value(job) == "attempt 2"
    assert (submitter.ended(job).state, effects(platform, job)) == ("succeeded", [2])
    until(lambda: counters(platform)["stale.release"] >= 1, "the late end is counted")
    outcomes(submitter, job, "lost", "succeeded")
    assert submitter.row(job).worker == "b"
    # The stopped process is a worker again.
    until(lambda: platform.redis.exists(keys.view("a")), "a is back")
    assert submitter.value(submitter.send(ADD, 1, 2)) == 3


# -- sessions that cannot be used


@pytest.fixture
def here(platform: Platform, submitter: Submitter) -> Iterator[Attempt]:
    """Yield an attempt that a worker holds, for which this thread speaks."""
    platform.worker("a", cpus=2)
    job = submitter.send(HOLD, "gate")
    tasks.started(platform.redis, "gate")
    row = submitter.until(job, "running")
    with held(Attempt(Tag(job, Token(row.epoch, row.attempt)), row.incarnation)) as attempt:
        yield attempt
    tasks.let_go(platform.redis, "gate")
    submitter.ended(job)


def test_outside_of_an_attempt_nothing_is_fenced(platform: Platform) -> None:
    outside = pytest.raises(PlatformError, match="outside of a running attempt")
    with Session(platform.engine) as session, outside, fenced(session):
        pytest.fail("not reached")


def test_session_on_another_database_is_refused_before_any_write(
    platform: Platform, server_pair: Pair, here: Attempt
) -> None:
    with empty_database(server_pair) as other:
        engine = create_engine(other)
        with engine.begin() as connection:
            connection.execute(text(TABLE))
        with Session(engine) as session, pytest.raises(InvalidRequest, match="another"), fenced(session):
            pytest.fail("not reached")
        with Session(engine) as session:
            assert session.execute(text("SELECT count(*) FROM effects")).scalar_one() == 0
        engine.dispose()
    postgres = create_engine(platform.engine.url.set(database="postgres"))
    with Session(postgres) as session, pytest.raises(InvalidRequest, match="another"), fenced(session):
        pytest.fail("not reached")
    postgres.dispose()
    with Session(create_engine("sqlite://")) as session, pytest.raises(InvalidRequest, match="sqlite"), fenced(session):
        pytest.fail("not reached")


def test_a_session_that_commits_by_itself_is_refused(platform: Platform, here: Attempt) -> None:
    engine = platform.engine.execution_options(isolation_level="AUTOCOMMIT")
    with Session(engine) as session, pytest.raises(InvalidRequest, match="autocommit"), fenced(session):
        pytest.fail("not reached")
    wrong: Any = platform.engine
    with pytest.raises(InvalidRequest, match="Session"), fenced(wrong):
        pytest.fail("not reached")


def test_an_attempt_that_postgres_gave_up_is_rolled_back_and_told_so(platform: Platform, here: Attempt) -> None:
    with platform.engine.begin() as connection:
        connection.execute(text("UPDATE jobs SET step = :step"), {"step": Step.GIVEN_UP.value})
    with Session(platform.engine) as session, pytest.raises(LeaseLost, match="given up"), fenced(session):
        session.execute(text("INSERT INTO effects VALUES ('job', 1)"))
    assert effects(platform, "job") == []


def test_of_two_attempts_at_once_one_commits(platform: Platform, submitter: Submitter, here: Attempt) -> None:
    """Both attempts are in their blocks, and the row takes one end."""
    with Session(platform.engine) as session, fenced(session):
        session.execute(text("INSERT INTO effects VALUES ('job', 1)"))
    later = Attempt(Tag(here.tag.job, Token(here.tag.token.epoch, here.tag.token.attempt + 1)), here.incarnation)
    too_late = pytest.raises(LeaseLost, match="ended as succeeded")
    with held(later), Session(platform.engine) as session, too_late, fenced(session):
        session.execute(text("INSERT INTO effects VALUES ('job', 2)"))
    assert effects(platform, "job") == [1]
