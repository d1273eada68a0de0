"""Workers that left long ago are forgotten, and the queues of those that died before the ledger was lost."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import text

from celery_capacity.routing.ledger import keys
from celery_capacity.workers.process.stores import Stores
from celery_capacity.workers.retention import former_workers
from tests.fixtures.stores.staged import Stage

NO_APP: Any = None
LONG_AGO = "now() - make_interval(secs => :seconds)"


def rows(stage: Stage) -> set[str]:
    with stage.engine.connect() as connection:
        return set(connection.execute(text("SELECT incarnation FROM workers")).scalars())


def leave(stage: Stage, incarnation: str, seconds: float, status: str = "left") -> None:
    end = f"UPDATE workers SET status = :status, left_at = {LONG_AGO} WHERE incarnation = :incarnation"
    stage.sql(end, status=status, incarnation=incarnation, seconds=seconds)


@pytest.mark.leaves("I6", because="the row of a job is given to another worker")
def test_rows_of_workers_that_left_long_ago_are_forgotten(stage: Stage, stores: Stores) -> None:
    long = stores.settings.lost_after * former_workers.KEEP_TIMES + 60
    lives = [stage.worker(name, cpus=1000) for name in ("here", "lately", "left", "lost", "holds")]
    held = stage.submit(cpus=1000)
    stage.sql("UPDATE jobs SET incarnation = 'holds-life', worker = 'holds' WHERE id = :id", id=held)
    leave(stage, "lately-life", long / 2)
    leave(stage, "left-life", long)
    leave(stage, "lost-life", long, "lost")
    leave(stage, "holds-life", long, "lost")
    assert former_workers.run_once(NO_APP, stores)["forgotten"] == 2
    assert rows(stage) == set(lives) - {"left-life", "lost-life"}
    assert former_workers.without_ledger(NO_APP, stores) == {"forgotten": 0}


def test_private_queues_of_dead_incarnations_are_removed(stage: Stage, stores: Stores) -> None:
    lives = {name: letter * 32 for name, letter in (("a", "a"), ("b", "b"), ("c.d", "c"))}
    for name in ("a", "b"):
        stage.worker(name, cpus=1000)
        stage.sql("UPDATE workers SET incarnation = :life WHERE name = :name", life=lives[name], name=name)
    leave(stage, lives["b"], 1.0, "lost")
    alive, *dead = (keys.private_queue(name, life) for name, life in lives.items())
    others = ["worker.of.somebody", "worker.a.letter"]
    for queue in (alive, *dead, *others):
        stage.redis.lpush(queue, b"a message")
    assert former_workers.run_once(NO_APP, stores)["queues"] == 2
    assert stage.redis.exists(alive, *others) == 3
    assert not stage.redis.exists(*dead)
