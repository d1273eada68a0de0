"""The duty sees that the memory of Redis runs short, before Redis refuses jobs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from celery_capacity.routing.inspect.overview import from_ledger
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.workers.duties import refill
from tests.fixtures.stores.staged import Stage


class Short(Ledger):
    """A ledger whose server has used so many of 100 bytes."""

    used = 0

    def memory(self) -> tuple[int, int, bool]:
        return self.used, 100, super().memory()[2]


@pytest.fixture
def short(stage: Stage) -> Iterator[Short]:
    ledger = Short(stage.settings)
    ledger.epoch = stage.ledger.epoch
    yield ledger
    ledger.client.close()


def test_memory_runs_short_above_one_share_and_until_another(short: Short, stage: Stage) -> None:
    class Stores:
        ledger = short

    stores: Any = Stores()
    seen = []
    for short.used in (50, 89, 91, 86, 84, 89):
        refill.watch_memory(stores)
        seen.append(from_ledger(stage.redis).memory_short)
    assert seen == [False, False, True, True, False, False]


def test_server_without_a_limit_of_memory_never_runs_short(stage: Stage) -> None:
    used, limit, tight = stage.ledger.memory()
    assert used > 0
    assert (limit, tight) == (0, False)
