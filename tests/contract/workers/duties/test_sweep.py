"""The sweep restores the sum of the allocated CPUs once its key was lost, without a whole reconcile."""

from __future__ import annotations

from typing import Any

import pytest

from celery_capacity.routing.ledger import keys
from celery_capacity.workers.duties import sweep
from celery_capacity.workers.process.stores import Stores
from tests.fixtures.stores.staged import Stage


def total(stage: Stage) -> list[bytes]:
    stored: Any = stage.redis.mget(keys.ALLOCATED, keys.ALLOCATED_CPUS)
    return list(stored)


@pytest.mark.parametrize("ended", [0, 1, 2])
def test_lost_sum_of_cpus_is_restored(stage: Stage, stores: Stores, ended: int) -> None:
    stage.worker("a", cpus=4000)
    jobs = [stage.submit(cpus=1500) for _ in range(2)]
    for job in jobs:
        stage.start(job)
    stage.redis.delete(keys.ALLOCATED, keys.ALLOCATED_CPUS)
    for job in jobs[:ended]:
        stage.end(job)
    assert sweep.run_once(None, stores)["drift"] == 1
    assert total(stage) == [[b"3000", b"3"], [b"1500", b"1.5"], [b"0", b"0"]][ended]
    assert sweep.run_once(None, stores)["drift"] == 0
    for job in jobs[ended:]:
        stage.end(job)
    assert total(stage) == [b"0", b"0"]
