"""Workers that are lost: one that cannot be taken back now does not keep the others, and who lives is left alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import Engine, text

from routing import fence, takeback
from routing.accept import Publisher
from routing.settings import Settings
from tests.fixtures.staged import Stage
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
