"""A job that may start only once (`rerun=False`) has no second attempt after one that may have started.

Any other job has one, and its loss counts.
"""

from __future__ import annotations

import pytest

from celery_capacity.routing.ledger import keys
from celery_capacity.routing.recovery.reconcile import reconcile
from tests.fixtures.stores.staged import Stage


@pytest.fixture
def stage(stage: Stage) -> Stage:
    stage.worker("a", cpus=4000)
    return stage


@pytest.mark.parametrize(
    ("rerun", "losses", "state", "counted"), [(False, 0, "lost", 1), (True, 0, "waiting", 1), (True, 2, "lost", 3)]
)
def test_job_of_a_worker_that_has_left_is_lost_and_counted(
    stage: Stage, rerun: bool, losses: int, state: str, counted: int
) -> None:
    job = stage.submit(cpus=1000)
    stage.start(job)
    stage.sql("UPDATE jobs SET rerun = :rerun, losses = :losses WHERE id = :job", rerun=rerun, losses=losses, job=job)
    # Neither the job nor its worker is in the books any more.
    stage.redis.delete(keys.job(job), keys.held("a"), keys.book("a"))
    stage.redis.zrem(keys.LEASES, "a")
    stage.sql("UPDATE workers SET status = 'left', left_at = now()")
    assert reconcile(stage.engine, stage.ledger).all_repaired
    stage.apply()
    row = stage.row(job)
    assert (row.state, row.losses, row.attempt) == (state, counted, 1)
    if state == "lost":
        assert row.error == "the ledger did not know it"
        assert not stage.redis.exists(keys.job(job))


def test_job_that_was_admitted_and_not_started_goes_back_without_a_loss(stage: Stage) -> None:
    job = stage.submit(cpus=1000)
    stage.sql("UPDATE jobs SET rerun = false WHERE id = :job", job=job)
    stage.redis.delete(keys.job(job), keys.held("a"), keys.book("a"))
    stage.redis.zrem(keys.LEASES, "a")
    assert reconcile(stage.engine, stage.ledger).all_repaired
    stage.apply()
    assert (stage.row(job).state, stage.row(job).losses) == ("waiting", 0)
