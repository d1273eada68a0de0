"""Stores of a process that runs duties, beside those of the test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from celery_capacity.routing.config.settings import Settings
from celery_capacity.workers.process.stores import Stores
from tests.fixtures.stores.staged import Stage


@pytest.fixture
def stores(stage: Stage, settings: Settings) -> Iterator[Stores]:
    stores = Stores(lambda _: settings)
    stores._made["settings"] = settings
    stores.ledger.epoch = stage.ledger.epoch
    yield stores
    stores.engine.dispose()
    stores.redis.close()
    stores.ledger.client.close()
