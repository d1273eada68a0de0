"""The log says of an empty Redis what it means: a first start is no warning, and lost scheduler state is one."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from celery_capacity.workers.membership.cold_ledger import open_ledger
from celery_capacity.workers.process.stores import Stores
from tests.fixtures.stores.staged import Stage


@pytest.fixture
def stores(stage: Stage, caplog: pytest.LogCaptureFixture) -> Iterator[Stores]:
    caplog.set_level(logging.INFO)
    stores = Stores(lambda _settings: stage.settings)
    yield stores
    stores.engine.dispose()
    stores.ledger.client.close()


def lines(caplog: pytest.LogCaptureFixture) -> list[tuple[int, str]]:
    return [(record.levelno, record.getMessage()) for record in caplog.records if "cold_ledger" in record.name]


def test_first_start_is_news(stage: Stage, stores: Stores, caplog: pytest.LogCaptureFixture) -> None:
    stage.redis.flushdb()
    assert open_ledger(stores)["epochs"] == 1
    assert lines(caplog) == [(logging.INFO, "scheduler state initialised (epoch 2)")]


def test_lost_state_is_a_warning(stage: Stage, stores: Stores, caplog: pytest.LogCaptureFixture) -> None:
    stage.submit(cpus=9000)
    stage.redis.flushdb()
    assert open_ledger(stores)["filed"] == 1
    expected = "scheduler state was lost and is rebuilt: epoch 2 is open, with 0 workers, 0 held and 1 waiting jobs"
    assert lines(caplog) == [(logging.WARNING, expected)]
