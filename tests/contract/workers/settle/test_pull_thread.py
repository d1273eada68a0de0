"""The jobs that a worker takes from Postgres: a job that cannot be taken now holds back no other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest
from sqlalchemy import Engine, text

from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.model.states import Store
from celery_capacity.routing.store import controls
from celery_capacity.workers.membership.authority_check import Confirmation
from celery_capacity.workers.membership.context import WorkerContext
from celery_capacity.workers.process.holdings import Holdings
from celery_capacity.workers.process.identity import Identity
from celery_capacity.workers.process.stores import Stores, transactions
from celery_capacity.workers.settle.pull_thread import Puller
from tests.contract.routing.store.test_refused_transitions import refuse
from tests.fixtures.stores.staged import Stage
from tests.fixtures.waiting import until


@pytest.fixture
def stage(stage: Stage) -> Stage:
    stage.worker("a", cpus=2000)
    stage.sql("UPDATE authority SET authority = 'postgres', changed_at = 'epoch'")
    return stage


@pytest.fixture
def puller(stage: Stage, settings: Settings) -> Iterator[Puller]:
    """Yield a puller with room for two jobs of one CPU."""
    stores = Stores(lambda _: settings)
    confirmation = Confirmation(stores.engine, 1.0, lambda: None)
    confirmation.ask()
    nothing: Any = Mock()
    parts = (Identity("a"), confirmation, Holdings({"cpus": 2000, "slots": 2}), nothing)
    context = WorkerContext(settings, stores.engine, stage.ledger, *parts)
    puller = Puller(context, stores, lambda _: True, lambda _: None, lambda: True)
    yield puller
    stores.engine.dispose()


def test_worker_that_cannot_listen_takes_jobs_all_the_same(stage: Stage, settings: Settings, puller: Puller) -> None:
    """All connections past the pooler are taken, for example."""
    puller._stores._made["settings"] = replace(
        settings, direct_database_url="postgresql+psycopg2://nobody@127.0.0.1:1/none"
    )
    job = stage.insert({"cpus": 1000})
    puller.start()
    until(lambda: stage.row(job).state == "running", "it is taken")
    assert puller._listening is None
    puller.stop(10.0)


def test_worker_is_filled_beside_locked_rows(engine: Engine, stage: Stage, puller: Puller) -> None:
    jobs = [stage.insert({"cpus": 1000}) for _ in range(5)]
    with engine.connect() as connection, connection.begin():
        connection.execute(text("SELECT 1 FROM jobs WHERE id = ANY(:ids) FOR UPDATE"), {"ids": jobs[:2]})
        puller._pass()
        assert sorted(puller._holdings.jobs()) == jobs[2:4]
    assert [stage.row(job).state for job in jobs] == ["accepted", "accepted", "running", "running", "accepted"]


def test_worker_is_filled_beside_rows_that_take_no_write(stage: Stage, puller: Puller) -> None:
    jobs = [stage.insert({"cpus": 1000}) for _ in range(5)]
    refuse(stage, f"NEW.id IN ('{jobs[0]}', '{jobs[2]}')")
    puller._pass()
    assert sorted(puller._holdings.jobs()) == [jobs[1], jobs[3]]


@pytest.mark.leaves("I6", because="Postgres decides, and then the ledger again, which never hears of the job")
def test_puller_has_a_thread_only_while_postgres_decides(stage: Stage, puller: Puller) -> None:
    confirmation = puller._confirmation
    confirmation.authority, confirmation.on_authority = Store.LEDGER, puller.wake
    puller.start()
    assert not puller.is_alive()
    job = stage.insert({"cpus": 1000})
    # Postgres names itself as the authority.
    confirmation.ask()
    until(lambda: stage.row(job).state == "running", "it is taken")
    stage.sql("UPDATE authority SET authority = 'ledger'")
    confirmation.ask()
    until(lambda: not puller.is_alive(), "its thread has ended")
    puller.stop(10.0)


def test_full_worker_hears_of_its_drain(stage: Stage, puller: Puller) -> None:
    """A drain may have a deadline at which the jobs that fill the worker go back."""
    puller.on_cordon = heard = Mock()
    jobs = [stage.insert({"cpus": 1000}) for _ in range(2)]
    puller._pass()
    assert sorted(puller._holdings.jobs()) == jobs
    with transactions(stage.engine).begin() as connection:
        controls.cordon(connection, ["a"], "ann@desk", None, drains=True, deadline=0.0)

    def hears() -> bool:
        puller._pass()
        return bool(heard.called)

    until(hears, "it looks for its cordon")
    stage.sql("DELETE FROM cordons")
