"""The duties of a worker: one that fails does not keep the others from being done."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy import Engine, text

from routing.settings import Settings
from tests.fixtures.staged import Stage
from workers.duties import DUTIES
from workers.duties.runner import Runner
from workers.stores import Stores


@pytest.fixture
def stage(engine: Engine, settings: Settings) -> Iterator[Stage]:
    stage = Stage(engine, settings)
    stage.worker("a", cpus=1000)
    yield stage
    stage.close()


@pytest.fixture
def runner(stage: Stage, settings: Settings) -> Iterator[Runner]:
    stores = Stores(lambda _: settings)
    stores._made["settings"] = settings
    no_app: Any = None
    runner = Runner(no_app, stores, "a-life")
    runner._window._since -= 3600
    yield runner
    runner._stores.ledger.client.close()
    stores.engine.dispose()


def test_a_row_that_somebody_keeps_locked_stops_no_other_duty(engine: Engine, stage: Stage, runner: Runner) -> None:
    """A session that was left open, say: the duty `due` comes first, and cannot end the job that has expired."""
    expired, lost = stage.insert({"cpus": 1000}), stage.submit(cpus=1000)
    stage.start(lost)
    due = stage.insert({"cpus": 2000}, due_at=datetime.now(UTC))
    stage.sql("UPDATE jobs SET expires_at = now() WHERE id = :id", id=expired)
    stage.ledger.condemn("a", "a-life")
    with engine.connect() as connection, connection.begin():
        connection.execute(text("SELECT 1 FROM jobs WHERE id = :id FOR UPDATE"), {"id": expired})
        runner._run(list(DUTIES))
        stage.apply()
        assert (stage.row(lost).state, stage.row(lost).losses) == ("waiting", 1)
        assert stage.row(due).state == "waiting"
        assert runner._window.seconds() > 60
    assert stage.row(expired).state == "accepted"
