"""Unknown claims of a dead worker: attempt numbers are not used twice, and the loss counts.

The worker dies with jobs that it had just claimed, and the ledger is lost before Postgres had their claims.
"""

from __future__ import annotations

import pytest
from sqlalchemy import Engine, text

from celery_capacity.routing.config import timeouts
from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.ledger import keys
from celery_capacity.routing.ledger.replies import Arrived, Ended
from celery_capacity.routing.ledger.snapshot import read_cards
from celery_capacity.routing.model.states import Outcome, Step
from celery_capacity.routing.model.token import Token
from celery_capacity.routing.recovery import rebuild
from celery_capacity.routing.store.job_transitions import Transition
from celery_capacity.workers.process import claim_writer
from celery_capacity.workers.process.stores import make_engine
from tests.fixtures.stores.staged import MOST_LOSSES, Stage


@pytest.fixture
def stage(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> Stage:
    # No worker of these tests speaks by itself.
    monkeypatch.setattr(timeouts, "REPORT", 0.0)
    stage.worker("a", cpus=1000)
    return stage


def claim(stage: Stage, job: str, token: Token, worker: str) -> None:
    arrived = [Arrived(job, token, "nonce")]
    settled = stage.ledger.settle(worker, f"{worker}-life", arrived=arrived, most_losses=MOST_LOSSES)
    assert settled.claimed[0].ok


def lose(stage: Stage) -> None:
    """Lose the ledger, and open it anew."""
    stage.redis.flushdb()
    assert rebuild.open_if_cold(stage.engine, stage.ledger) is not None
    stage.apply()


def token(stage: Stage, job: str) -> Token:
    return read_cards(stage.redis, [job])[job].token


def test_poison_starts_as_often_as_allowed_though_one_claim_was_unknown(stage: Stage) -> None:
    job = stage.submit(cpus=1000, applied=False)
    claim(stage, job, Token(1, 1), "a")
    starts = [Token(1, 1)]
    lose(stage)
    stage.worker("b", cpus=1000)
    while (card := read_cards(stage.redis, [job])[job]).state == "admitted":
        starts.append(card.token)
        claim(stage, job, card.token, "b")
        ended = [Ended(job, card.token, Outcome.LOST)]
        stage.ledger.settle("b", "b-life", ended=ended, most_losses=MOST_LOSSES)
    stage.apply()
    assert starts == [Token(1, 1), Token(2, 2), Token(2, 3)]
    assert (stage.row(job).state, stage.row(job).losses) == ("lost", 3)


def test_number_of_an_unknown_attempt_is_used_once_for_all_that_waited(stage: Stage) -> None:
    """Nobody knows which of them had started."""
    jobs = [stage.submit(cpus=1000, applied=number < 2) for number in range(3)]
    lose(stage)
    stage.worker("b", cpus=4000)
    # The first job was admitted, as Postgres says, and its worker is silent: the worker keeps it until it is lost.
    assert [token(stage, job) for job in jobs] == [Token(1, 1), Token(2, 2), Token(2, 2)]
    assert [stage.row(job).losses for job in jobs] == [0, 1, 1]
    stage.ledger.expire_lease("a", "a-life")
    assert stage.ledger.lapse("a", 0, MOST_LOSSES).verdict == "gone"
    stage.apply()
    assert (stage.row(jobs[0]).state, stage.row(jobs[0]).losses) == ("accepted", 1)


def test_nothing_is_in_doubt_where_every_worker_said_what_it_holds(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = stage.submit(cpus=9000)

    def report(opener: object, workers: list[str]) -> None:
        stage.worker("a", cpus=1000)

    monkeypatch.setattr(rebuild.Opener, "_await_reports", report)
    lose(stage)
    assert (token(stage, job), stage.row(job).losses) == (Token(2, 0), 0)


def test_nothing_is_in_doubt_where_the_stream_survived(stage: Stage) -> None:
    job = stage.submit(cpus=9000)
    stage.redis.hset(keys.EPOCH, "epoch", 7)
    assert rebuild.open_if_cold(stage.engine, stage.ledger) is not None
    stage.apply()
    assert (token(stage, job), stage.row(job).losses) == (Token(8, 0), 0)


def test_job_is_in_doubt_once_and_one_that_came_later_never(stage: Stage) -> None:
    job = stage.submit(cpus=9000)
    lose(stage)
    lose(stage)
    assert (token(stage, job), stage.row(job).losses) == (Token(3, 2), 1)
    stage.sql("UPDATE authority SET opening_at = NULL")
    later = stage.insert({"cpus": 9000})
    stage.sql("UPDATE jobs SET submitted_at = now() + interval '1 minute' WHERE id = :job", job=later)
    lose(stage)
    assert (token(stage, later), stage.row(later).losses) == (Token(4, 0), 0)


def test_lost_worker_s_unknown_claim_of_a_row_that_says_admitted_counts(stage: Stage) -> None:
    job = stage.submit(cpus=1000)
    claim(stage, job, Token(1, 1), "a")
    stage.sql("UPDATE workers SET status = 'lost'")
    lose(stage)
    assert (stage.row(job).state, stage.row(job).losses) == ("waiting", 1)
    stage.worker("b", cpus=1000)
    assert token(stage, job) == Token(2, 2)


@pytest.mark.parametrize(
    ("change", "has_claim"),
    [
        ("SELECT 1", True),
        ("UPDATE jobs SET state = 'running', epoch = 1, attempt = 1, step = 2, incarnation = 'a-life'", True),
        ("UPDATE jobs SET step = 4, epoch = 1, attempt = 1, state = 'running', incarnation = 'a-life'", False),
        ("UPDATE jobs SET epoch = 2, attempt = 2, step = 1, state = 'admitted'", False),
        pytest.param(
            *("UPDATE jobs SET state = 'cancelled', finished_at = now()", False),
            marks=pytest.mark.leaves("I3", because="the ledger was not told that the job is cancelled"),
        ),
    ],
)
def test_claim_is_known_when_its_row_says_so(stage: Stage, change: str, has_claim: bool) -> None:
    job = stage.submit(cpus=1000, applied=False)
    stage.sql(change)
    assert claim_writer.write(stage.engine, claim_of(job)) is has_claim
    assert claim_writer.write(stage.engine, claim_of(job)) is has_claim, "again"


def test_claim_of_a_locked_row_is_not_known_now(stage: Stage, engine: Engine, settings: Settings) -> None:
    job = stage.submit(cpus=1000, applied=False)
    workers_own = make_engine(str(settings.database_url))
    with engine.connect() as connection, connection.begin():
        connection.execute(text("SELECT 1 FROM jobs FOR UPDATE"))
        assert claim_writer.write(workers_own, claim_of(job)) is None
    assert claim_writer.write(workers_own, claim_of(job)) is True
    workers_own.dispose()


def claim_of(job: str) -> Transition:
    return Transition(job, Token(1, 1), "running", Step.RUNNING, "a", "a-life", 1, 2, 2, 0)
