"""Workers that are lost: one that cannot be taken back now does not keep the others, and who lives is left alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import OperationalError

from routing import fence
from routing.accept import Publisher
from routing.settings import Settings
from tests.fixtures.staged import Stage
from tests.fixtures.waiting import until
from workers.duties import lapse
from workers.stores import Stores


@pytest.fixture
def stage(engine: Engine, settings: Settings) -> Iterator[Stage]:
    stage = Stage(engine, settings)
    yield stage
    stage.close()


@pytest.fixture
def stores(stage: Stage, settings: Settings) -> Iterator[Stores]:
    stores = Stores(lambda _: settings)
    stores._made["settings"] = settings
    stores.ledger.epoch = stage.ledger.epoch
    yield stores
    stores.ledger.client.close()
    stores.engine.dispose()


def running(stage: Stage, worker: str) -> str:
    stage.worker(worker, cpus=1000)
    job = stage.submit(cpus=1000)
    stage.start(job)
    return job


def test_a_lost_worker_whose_commit_hangs_does_not_keep_the_jobs_of_others(
    engine: Engine, stage: Stage, stores: Stores
) -> None:
    """Its machine went away, or it was stopped, between the guarded statement and the commit: the row is locked."""
    hangs, other = running(stage, "a"), running(stage, "b")
    for worker in ("a", "b"):
        stage.ledger.condemn(worker, f"{worker}-life")
    with engine.connect() as connection, connection.begin():
        assert fence.commit(connection, Publisher(hangs, stage.ledger.epoch, 1, "a-life"))
        assert lapse.run_once(None, stores)["taken_back"] == 1
        stage.apply()
        assert stage.row(other).state == "waiting"
    assert lapse.run_once(None, stores) == {"closed": 0, "lost": 1, "taken_back": 0}
    assert stage.row(hangs).state == "succeeded"


def test_a_commit_that_hangs_for_longer_than_a_worker_may_is_ended_by_the_server(engine: Engine, stage: Stage) -> None:
    job = running(stage, "a")
    with engine.connect() as connection, pytest.raises(OperationalError), connection.begin():
        assert fence.commit(connection, Publisher(job, stage.ledger.epoch, 1, "a-life"), hangs_after=0.05)
        until(lambda: takes(stage, job), "the row is free")
        connection.execute(text("SELECT 1"))
    assert stage.row(job).state == "running"


def takes(stage: Stage, job: str) -> bool:
    with stage.engine.connect() as connection:
        query = text("SELECT count(*) FROM (SELECT FROM jobs WHERE id = :id FOR UPDATE SKIP LOCKED) AS free")
        return bool(connection.execute(query, {"id": job}).scalar_one())
