"""The commit of an attempt by itself, and the fate of its row when its worker speaks, dies or wakes up late."""

from __future__ import annotations

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.exc import OperationalError

from celery_capacity.routing.inspect import verify
from celery_capacity.routing.ledger import keys
from celery_capacity.routing.ledger.replies import Adopted, Arrived
from celery_capacity.routing.model.job import Publisher
from celery_capacity.routing.model.states import Step
from celery_capacity.routing.model.token import Token
from celery_capacity.routing.recovery import reclaim, transition_log
from celery_capacity.routing.recovery.reconcile import reconcile
from celery_capacity.routing.store import claims, fencing
from tests.fixtures.stores.staged import MOST_LOSSES, Stage


@pytest.fixture
def stage(stage: Stage) -> Stage:
    stage.worker("a", cpus=4000)
    return stage


def mine(stage: Stage, job: str, attempt: int = 1) -> Publisher:
    return Publisher(job, Token(stage.ledger.epoch, attempt), "a-life")


def commit(stage: Stage, job: str, attempt: int = 1) -> bool:
    with stage.engine.connect() as connection:
        return fencing.commit(connection, mine(stage, job, attempt))


def running(stage: Stage) -> str:
    job = stage.submit(cpus=1000)
    stage.start(job)
    return job


def outcome(stage: Stage, job: str) -> list[str | None]:
    with stage.engine.connect() as connection:
        query = text("SELECT outcome FROM attempts WHERE job_id = :job ORDER BY epoch, attempt")
        return list(connection.execute(query, {"job": job}).scalars())


def test_a_running_attempt_commits_once(stage: Stage) -> None:
    job = running(stage)
    assert commit(stage, job)
    row = stage.row(job)
    assert (row.state, row.step, row.worker, row.finished_at is not None) == ("succeeded", Step.COMMITTED, "a", True)
    assert outcome(stage, job) == ["succeeded"]
    assert not commit(stage, job)
    assert not commit(stage, job, 2)
    with stage.engine.connect() as connection:
        assert fencing.why_not(connection, mine(stage, job)) == ("the job has ended as succeeded by attempt 1", True)
        assert fencing.why_not(connection, mine(stage, job, 2))[1] is False


def test_an_attempt_commits_though_postgres_does_not_know_of_it_yet(stage: Stage) -> None:
    job = stage.submit(cpus=1000, applied=False)
    assert stage.row(job).state == "accepted"
    assert commit(stage, job)
    # Entries that come from the stream then are older than its end.
    stage.apply()
    assert (stage.row(job).state, stage.row(job).attempt) == ("succeeded", 1)


def test_an_attempt_that_is_not_the_newest_cannot_commit(stage: Stage) -> None:
    job = running(stage)
    stage.end(job, "lost")
    assert stage.row(job).attempt == 2
    assert not commit(stage, job, 1)
    with stage.engine.connect() as connection:
        assert fencing.why_not(connection, mine(stage, job)) == ("attempt 2 has the job", False)
    assert commit(stage, job, 2)


def test_an_attempt_that_published_its_retry_cannot_commit(stage: Stage) -> None:
    job = running(stage)
    stage.sql("UPDATE jobs SET successor = message, successor_retries = 1, successor_nesting = 0 WHERE id = :j", j=job)
    assert not commit(stage, job)
    with stage.engine.connect() as connection:
        assert fencing.why_not(connection, mine(stage, job))[1]


@pytest.mark.parametrize("end", ["succeeded", "failed", "cancelled", "retried"])
def test_committed_end_stands_against_any_report_of_its_worker(stage: Stage, end: str) -> None:
    job = running(stage)
    assert commit(stage, job)
    before = stage.row(job)
    stage.end(job, end)
    row = stage.row(job)
    assert (row.state, row.step, row.losses) == ("succeeded", Step.ENDED, 0)
    assert (row.finished_at, row.error) == (before.finished_at, None)
    assert outcome(stage, job)[0] == "succeeded"
    # Where nobody said what the job returned, a waiting client hears of its end.
    assert (row.outbox is not None) == (end in ("cancelled", "retried"))


@pytest.mark.leaves("I6", because="the row is closed, and nobody reconciles")
def test_an_attempt_that_died_after_its_commit_is_closed_once(stage: Stage) -> None:
    job, other = running(stage), running(stage)
    commit(stage, job)
    with stage.engine.connect() as connection:
        assert [fencing.close(connection, job_id, Token(1, 1)) for job_id in (job, job, other)] == [True, False, False]
        assert [fencing.final_state(connection, job_id) for job_id in (job, other)] == ["succeeded", None]
    assert (stage.row(job).step, stage.row(job).outbox is not None) == (Step.ENDED, True)


@pytest.mark.leaves("I3", "I6", because="the ledger knows nothing of the attempt that ended")
def test_an_attempt_before_it_whose_end_was_lost_is_closed_with_it(stage: Stage) -> None:
    job = running(stage)
    with stage.engine.begin() as connection:
        # Its worker says that it runs. The end of the attempt was lost with the ledger.
        transition_log.apply_all(stage.engine, stage.ledger)
        assert fencing.commit(connection, mine(stage, job, attempt=2))
    with stage.engine.connect() as connection:
        assert fencing.close(connection, job, Token(1, 2))
    assert outcome(stage, job) == ["taken_back", "succeeded"]


def test_a_reconcile_leaves_a_committed_job_to_its_worker(stage: Stage) -> None:
    job = running(stage)
    commit(stage, job)
    assert reconcile(stage.engine, stage.ledger).to_json()["kinds"] == {}
    assert stage.redis.hget(keys.held("a"), job) == b"1.1"
    assert verify.check(stage.engine, stage.redis, patience=0.2).lines() == []
    stage.end(job)
    assert reconcile(stage.engine, stage.ledger).to_json()["kinds"] == {}
    assert verify.check(stage.engine, stage.redis, at_rest=True, patience=0.2).lines() == []


def test_reconcile_makes_up_for_an_end_that_was_lost_with_the_stream(stage: Stage) -> None:
    job = running(stage)
    commit(stage, job)
    stage.end(job, applied=False)
    stage.redis.delete(keys.STREAM)
    report = reconcile(stage.engine, stage.ledger)
    kinds = {"a transition that was lost with the stream": 1, "ended by itself, and not held": 1}
    assert report.to_json()["kinds"] == kinds
    row = stage.row(job)
    assert (row.state, row.step, row.outbox is not None) == ("succeeded", Step.ENDED, True)
    assert reconcile(stage.engine, stage.ledger).drift == 0


# A worker that is lost.


def lose(stage: Stage) -> int:
    """Let the lease of `a` run out long ago, and return how many jobs were taken back."""
    stage.ledger.expire_lease("a", "a-life")
    lapsed = reclaim.take_back(stage.engine, stage.ledger, "a", "a-life", 0)
    assert lapsed.verdict == "gone"
    return lapsed.taken_back


def test_committed_job_of_a_lost_worker_does_not_run_again(stage: Stage) -> None:
    committed, other = running(stage), running(stage)
    assert commit(stage, committed)
    stage.worker("b", cpus=4000)
    assert lose(stage) == 1
    stage.apply()
    assert (stage.row(committed).state, stage.row(committed).step) == ("succeeded", Step.ENDED)
    assert stage.row(committed).outbox is not None
    assert (stage.row(other).state, stage.row(other).worker, stage.row(other).losses) == ("admitted", "b", 1)
    assert stage.redis.hexists(keys.held("b"), committed) is False


def test_attempt_of_a_lost_worker_cannot_commit_before_the_next_one(stage: Stage) -> None:
    job = running(stage)
    lose(stage)
    # The stream has not been applied: by the row the job runs.
    row = stage.row(job)
    assert (row.state, row.step) == ("running", Step.GIVEN_UP)
    assert not commit(stage, job)
    # Nor when its worker lives again.
    stage.worker("a", cpus=4000)
    assert not commit(stage, job)
    stage.apply()
    stage.start(job)
    assert commit(stage, job, 2)


def test_a_claim_that_only_the_stream_knew_is_given_up_too(stage: Stage) -> None:
    job = stage.submit(cpus=1000, applied=False)
    stage.ledger.settle("a", "a-life", arrived=[Arrived(job, Token(1, 1), "n")], most_losses=MOST_LOSSES)
    assert stage.row(job).state == "accepted"
    lose(stage)
    assert not commit(stage, job)


def test_nothing_is_taken_back_while_postgres_does_not_answer(stage: Stage) -> None:
    job = running(stage)
    stage.ledger.expire_lease("a", "a-life")
    nowhere = create_engine("postgresql+psycopg2://nobody@127.0.0.1:1/none")
    with pytest.raises(OperationalError):
        reclaim.take_back(nowhere, stage.ledger, "a", "a-life", 0)
    assert stage.redis.hget(keys.held("a"), job) == b"1.1"
    assert lose(stage) == 1


def test_looking_at_a_worker_that_is_known_to_be_dead_takes_nothing_back(stage: Stage) -> None:
    """Its jobs wait for `take_back`, which asks Postgres first what they had committed: none of them runs again."""
    committed = running(stage)
    assert commit(stage, committed)
    stage.worker("b", cpus=4000)
    stage.ledger.expire_lease("a", "a-life")
    assert stage.ledger.lapse("a", 0, MOST_LOSSES, most=0).verdict == "due"
    assert stage.redis.hget(keys.held("a"), committed) == b"1.1"
    assert lose(stage) == 0
    assert not stage.redis.exists(keys.held("b"))


def test_a_worker_that_renewed_just_now_keeps_its_jobs_and_may_speak(stage: Stage) -> None:
    job = running(stage)
    lapsed = reclaim.take_back(stage.engine, stage.ledger, "a", "a-life", 0)
    assert (lapsed.verdict, lapsed.taken_back) == ("alive", 0)
    with stage.engine.connect() as connection:
        assert connection.execute(text("SELECT status, left_at FROM workers")).one() == ("ready", None)
    # An attempt that it had begun may not commit any more: its job would end, and run again.
    assert not commit(stage, job)
    stage.end(job)
    assert stage.row(job).state == "succeeded"
    later = running(stage)
    assert commit(stage, later)


# A ledger that is opened anew.


@pytest.mark.leaves("I3", "I6", because="the ledger still has the life that ended", sometimes=True)
@pytest.mark.parametrize(("losses", "rerun", "state"), [(0, True, "accepted"), (2, True, "lost"), (0, False, "lost")])
def test_job_of_an_ended_incarnation_goes_back_or_is_lost(stage: Stage, losses: int, rerun: bool, state: str) -> None:
    job = running(stage)
    stage.sql("UPDATE jobs SET losses = :losses, rerun = :rerun", losses=losses, rerun=rerun)
    stage.sql("UPDATE workers SET status = 'lost'")
    with stage.engine.connect() as connection:
        claims.give_back(connection, claims.orphans(connection), None, "its worker has ended", MOST_LOSSES)
    row = stage.row(job)
    assert (row.state, row.losses) == (state, losses + 1)


def test_adopted_job_that_has_committed_ends_as_succeeded(stage: Stage) -> None:
    job = running(stage)
    commit(stage, job)
    stage.redis.flushdb()
    stage.ledger.open_epoch(2)
    stage.ledger.finish_epoch(2)
    stage.sql("UPDATE authority SET epoch = 2")
    stage.worker("a", cpus=4000)
    held = Adopted(job, Token(1, 1), stage.row(job).shape, 1, 5, 6, "n", 0)
    assert stage.ledger.adopt("a", "a-life", [held]) == []
    assert reconcile(stage.engine, stage.ledger).drift == 0
    transition_log.apply_all(stage.engine, stage.ledger)
    assert stage.row(job).state == "succeeded"
