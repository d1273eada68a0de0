"""The runner brings jobs in when it begins to listen: only jobs of which it knows that they have not started."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from celery import Celery

from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.ledger import keys
from celery_capacity.routing.ledger.replies import Arrived
from celery_capacity.routing.model.token import Token
from celery_capacity.workers.app.install import create_app
from celery_capacity.workers.runner.commit_listener import CommitListener
from tests.fixtures.stores.books import job_field
from tests.fixtures.stores.staged import MOST_LOSSES, Stage


@pytest.fixture
def stage(stage: Stage) -> Stage:
    stage.worker("a", cpus=4000)
    return stage


@pytest.fixture
def listener(stage: Stage, settings: Settings) -> Iterator[CommitListener]:
    app: Celery = create_app("listening", resolve=lambda _: settings)
    yield CommitListener(app.platform, lambda: True)
    app.platform.sending.close()
    app.close()
    app.platform.engine.dispose()


def test_listener_brings_in_what_was_committed_before(stage: Stage, listener: CommitListener) -> None:
    job = stage.insert({"cpus": 1000})
    listener._bring_in([""])
    assert job_field(stage.redis, job, "state") == b"admitted"


def test_listener_leaves_the_backlog_to_the_opener(stage: Stage, listener: CommitListener) -> None:
    job = stage.insert({"cpus": 1000})
    stage.redis.hset(keys.EPOCH, "rebuilding", "1")
    listener._bring_in([""])
    assert not stage.redis.exists(keys.job(job))


@pytest.mark.leaves("I1", because="the key of a running job was lost")
def test_listener_writes_what_started_before_it_brings_in(stage: Stage, listener: CommitListener) -> None:
    job = stage.submit(cpus=1000, applied=False)
    arrived = [Arrived(job, Token(stage.ledger.epoch, 1), "nonce")]
    stage.ledger.settle("a", "a-life", arrived=arrived, most_losses=MOST_LOSSES)
    stage.redis.delete(keys.job(job))
    listener._bring_in([""])
    assert not stage.redis.exists(keys.job(job))
    assert stage.row(job).state == "running"
