"""A row that was read before the books knew what an older epoch had noted of its job brings no job in."""

from __future__ import annotations

import pytest
from sqlalchemy import Engine, text

from celery_capacity.routing.config import timeouts
from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.ledger import keys
from celery_capacity.routing.ledger.replies import Arrived, Ended
from celery_capacity.routing.model.states import Outcome
from celery_capacity.routing.model.token import Token
from celery_capacity.routing.recovery import rebuild
from celery_capacity.routing.store import backlog
from celery_capacity.routing.store.backlog import Pending
from celery_capacity.workers.process.stores import make_engine
from tests.fixtures.stores.staged import MOST_LOSSES, Stage


@pytest.fixture
def stage(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> Stage:
    # No worker of these tests speaks.
    monkeypatch.setattr(timeouts, "REPORT", 0.0)
    stage.worker("a", cpus=4000)
    return stage


def read(stage: Stage, job: str) -> Pending:
    """Return the row as its submitter reads it."""
    with stage.engine.connect() as connection:
        return backlog.accepted(connection, [job])[0]


def run(stage: Stage, job: str, *, applied: bool) -> None:
    """Start and end the job on its worker; with `applied`, Postgres knows."""
    token = Token(stage.ledger.epoch, 1)
    claimed = stage.ledger.settle(
        "a", "a-life", arrived=[Arrived(job, token, "nonce")], most_losses=MOST_LOSSES
    ).claimed
    assert claimed[0].ok
    stage.ledger.settle("a", "a-life", ended=[Ended(job, token, Outcome.SUCCEEDED)], most_losses=MOST_LOSSES)
    if applied:
        stage.apply()


def open_anew(stage: Stage, engine: Engine) -> None:
    """Bring Redis back with its data, and open the next epoch."""
    stage.redis.hset(keys.EPOCH, "run_id", "another life")
    opened = rebuild.open_if_cold(engine, stage.ledger)
    assert opened is not None
    stage.ledger.epoch = opened.epoch


def test_row_read_before_an_epoch_was_opened_is_not_submitted_in_it(stage: Stage) -> None:
    """A sweep is stopped with a row in its hand; meanwhile its job ends, and the ledger is opened anew."""
    job = stage.insert({"cpus": 1000})
    pending = read(stage, job)
    assert stage.ledger.submit_many([pending.submission()]) == 1
    run(stage, job, applied=True)
    open_anew(stage, stage.engine)
    assert stage.row(job).state == "succeeded"
    assert stage.ledger.submit_many([pending.submission()]) == 0
    assert stage.ledger.submit(*pending.submission()[:4], read_ms=pending.read_ms).state == "late"
    assert not stage.redis.exists(keys.job(job))


def test_row_read_by_the_opener_is_submitted_though_its_clock_lags(stage: Stage) -> None:
    """The opener's estimate of the ledger's clock came with an answer that was slow."""
    job = stage.insert({"cpus": 1000})
    stage.redis.hset(keys.EPOCH, "run_id", "another life")
    stage.ledger.hear(stage.ledger.now_ms() - 2_000)
    opened = rebuild.open_if_cold(stage.engine, stage.ledger)
    assert opened is not None
    assert opened.filed == 1
    assert stage.redis.exists(keys.job(job))


def test_row_read_before_a_carried_job_was_let_in_is_not_submitted(
    stage: Stage, engine: Engine, settings: Settings
) -> None:
    """The row was locked while the epoch was opened, and was read when it did not say yet that its job has ended."""
    job = stage.insert({"cpus": 1000})
    assert stage.ledger.submit_many([read(stage, job).submission()]) == 1
    run(stage, job, applied=False)
    workers_own = make_engine(str(settings.database_url))
    with engine.connect() as connection, connection.begin():
        connection.execute(text("SELECT 1 FROM jobs WHERE id = :id FOR UPDATE"), {"id": job})
        open_anew(stage, workers_own)
        pending = read(stage, job)
    stage.apply()
    assert rebuild.bring_in_carried(stage.engine, stage.ledger) == 1
    assert stage.row(job).state == "succeeded"
    assert stage.ledger.submit_many([pending.submission()]) == 0
    workers_own.dispose()


def test_row_read_after_the_epoch_was_opened_is_submitted(stage: Stage) -> None:
    open_anew(stage, stage.engine)
    job = stage.insert({"cpus": 1000})
    assert stage.ledger.submit_many([read(stage, job).submission()]) == 1


def test_clock_of_redis_set_back_since_the_epoch_was_opened_refuses_no_row(stage: Stage) -> None:
    stage.redis.hset(keys.EPOCH, "opened", stage.ledger.measure() + 3_600_000)
    job = stage.insert({"cpus": 1000})
    assert stage.ledger.submit_many([read(stage, job).submission()]) == 1
