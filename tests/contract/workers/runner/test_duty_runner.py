"""The duties of a worker: a duty that fails does not keep the others from being done."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import pytest
from sqlalchemy import Engine, text

from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.ledger import keys
from celery_capacity.routing.ledger.replies import Adopted
from celery_capacity.routing.model.states import State, Store
from celery_capacity.routing.model.token import Token
from celery_capacity.workers import duties, learning, retention
from celery_capacity.workers.process.stores import Stores
from celery_capacity.workers.runner.duty_runner import DUTIES, SUSPICION, Duty, Runner
from tests.fixtures.stores.staged import MOST_LOSSES, Stage

#: Files without a duty of their own: what runs in place of others while Postgres decides, and the time of observation.
OF_OTHERS: Final = {"fallback", "window"}
MODULES: Final = [
    import_module(f"{folder.__name__}.{path.stem}")
    for folder in (duties, learning, retention)
    for path in sorted(Path(str(folder.__file__)).parent.glob("*.py"))
    if path.stem not in {"__init__", *OF_OTHERS}
]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.rpartition(".")[2])
def test_duty_is_one_pass_that_returns_its_counts(module: ModuleType) -> None:
    signature = inspect.signature(module.run_once)
    needed = [name for name, parameter in signature.parameters.items() if parameter.default is parameter.empty]
    assert needed == ["app", "stores"]
    assert signature.return_annotation == "dict[str, int]"


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.rpartition(".")[2])
def test_runner_has_each_duty_once(module: ModuleType) -> None:
    assert [duty.run for duty in DUTIES].count(module.run_once) == 1


def test_duty_has_a_name_of_its_own() -> None:
    assert len({duty.name for duty in DUTIES}) == len(DUTIES) == len(MODULES)


@pytest.fixture
def stage(stage: Stage) -> Stage:
    stage.worker("a", cpus=1000)
    return stage


@pytest.fixture
def runner(stage: Stage, settings: Settings) -> Iterator[Runner]:
    stores = Stores(lambda _: settings)
    stores._made["settings"] = settings
    no_app: Any = None
    runner = Runner(no_app, stores, "a-life", lambda: Store.LEDGER, stage.ledger)
    runner._begin()
    runner.election._stand()
    # Nobody renews the lease.
    runner.election._until += 3600
    runner.election.window._since -= 3600
    yield runner
    runner._stores.ledger.client.close()
    stores.engine.dispose()


def test_a_row_that_somebody_keeps_locked_stops_no_other_duty(engine: Engine, stage: Stage, runner: Runner) -> None:
    """A session was left open, for example: the duty `due` comes first, and cannot end the job that has expired."""
    expired, lost = stage.insert({"cpus": 1000}), stage.submit(cpus=1000)
    stage.start(lost)
    due = stage.insert({"cpus": 2000}, due_at=datetime.now(UTC))
    stage.sql("UPDATE jobs SET expires_at = now() WHERE id = :id", id=expired)
    stage.ledger.expire_lease("a", "a-life")
    with engine.connect() as connection, connection.begin():
        connection.execute(text("SELECT 1 FROM jobs WHERE id = :id FOR UPDATE"), {"id": expired})
        runner._run(list(DUTIES))
        stage.apply()
        assert (stage.row(lost).state, stage.row(lost).losses) == ("waiting", 1)
        assert stage.row(due).state == "waiting"
        assert runner.election.window.seconds() > 60
    assert stage.row(expired).state == "accepted"


@pytest.mark.parametrize("failing", ["due", "stream", "outbox", "sweep", "reconcile", "retention", "replaced", "keys"])
def test_duty_that_fails_stops_no_other_duty(
    stage: Stage, runner: Runner, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    """Any duty may fail, and a worker that died is lost all the same."""
    lost, due = stage.submit(cpus=1000), stage.insert({"cpus": 2000}, due_at=datetime.now(UTC))
    stage.start(lost)
    stage.ledger.expire_lease("a", "a-life")
    done = []

    def fail(*_: Any, **__: Any) -> dict[str, int]:
        raise RuntimeError("by the test")

    def instead(duty: Duty) -> Duty:
        def run(app: Any, stores: Stores, **more: Any) -> Any:
            done.append(duty.name)
            return duty.run(app, stores, **more)

        return replace(duty, run=fail if duty.name == failing else run)

    runner._run([instead(duty) for duty in DUTIES])
    assert done == [duty.name for duty in DUTIES if duty.name != failing]
    stage.apply()
    assert (stage.row(lost).state, stage.row(lost).losses) == ("waiting", 1)
    assert stage.row(due).state == ("scheduled" if failing == "due" else "waiting")
    assert runner.election.window.seconds() > 60


def test_duty_that_fails_is_tried_again_sooner_than_its_interval(stage: Stage, runner: Runner) -> None:
    def fail(*_: Any) -> dict[str, int]:
        raise RuntimeError("by the test")

    reconcile = replace(next(duty for duty in DUTIES if duty.name == "reconcile"), run=fail)
    interval = reconcile.interval(runner._stores.settings)
    runner._next_at[reconcile.name] = time.monotonic() + interval
    runner._run_one(reconcile, reconcile.run)
    first = runner._next_at[reconcile.name] - time.monotonic()
    assert first < interval / 2
    for _ in range(20):
        runner._run_one(reconcile, reconcile.run)
    assert first < runner._next_at[reconcile.name] - time.monotonic() <= interval


def test_ageing_that_is_off_is_looked_at_once_by_each_runner(runner: Runner) -> None:
    runner._begin()
    assert "ageing" in {duty.name for duty in runner._due()}
    runner._next_at = {name: at - 3600 for name, at in runner._next_at.items()}
    names = {duty.name for duty in runner._due()}
    assert ("ageing" in names, "sweep" in names) == (False, True)


@pytest.mark.parametrize("alive", [True, False])
def test_runner_is_asked_to_compare_where_a_book_was_lost(stage: Stage, runner: Runner, alive: bool) -> None:
    job = stage.submit(cpus=1000)
    stage.start(job)
    stage.redis.delete(keys.book("a"), keys.held("a"))
    runner.election._stand()
    assert SUSPICION not in runner._due()
    if alive:
        stage.worker("a", cpus=1000)
        row = stage.row(job)
        stage.ledger.adopt("a", "a-life", [Adopted(job, Token(row.epoch, 1), row.shape, 1, 5, 6, "", 0)])
    else:
        stage.redis.zadd(keys.LEASES, {"a": 1})
        runner._run([duty for duty in DUTIES if duty.name == "lapse"])
    runner.election._stand()
    assert SUSPICION in runner._due()
    runner._run([SUSPICION])
    assert stage.redis.mget(keys.ALLOCATED, keys.ALLOCATED_CPUS) == [b"1000", b"1"]
    if alive:
        stage.end(job)
    else:
        stage.redis.zadd(keys.LEASES, {"a": 1})
        assert stage.ledger.lapse("a", 0, MOST_LOSSES).taken_back == 1
        assert stage.ledger.cancel(job, State.CANCELLED).verdict == "ended"
    assert stage.redis.mget(keys.ALLOCATED, keys.ALLOCATED_CPUS) == [b"0", b"0"]


@pytest.mark.parametrize("begun", [False, True])
def test_successor_compares_the_suspects_of_a_former_runner(stage: Stage, runner: Runner, begun: bool) -> None:
    """Where keys of the ledger are gone, the lease of the runner may be among them."""
    runner.suspect()
    due_now = runner._due() if begun else []
    runner.election._until = 0.0
    if begun:
        runner._run(due_now)
    runner._serve_own()
    runner.election._fence = 0
    stage.ledger.client.delete(keys.RUNNER)
    term = runner.election._term
    other = stage.ledger.elect("b-life", 0, term)
    assert other.fence
    runner.election._stand()
    assert stage.ledger.elect("b-life", other.fence, term).asked == ("suspicion",)


def test_passes_of_duties_are_counted_by_their_results(
    stage: Stage, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*_: Any) -> dict[str, int]:
        return {}

    def fail(*_: Any) -> dict[str, int]:
        raise RuntimeError("by the test")

    def counted() -> dict[bytes, bytes]:
        runner.election._stand()
        counters: Any = stage.redis.hgetall(keys.COUNTERS)
        return {name: number for name, number in counters.items() if b"duty." in name}

    duties = [Duty("well", lambda _: 1.0, run), Duty("badly", lambda _: 1.0, fail, without=run)]
    runner._run([*duties, *duties])
    expected = {b"duty.well.done": b"2", b"duty.badly.failed": b"2"}
    assert counted() == expected
    runner._run_without_ledger(duties)
    expected |= {b"duty.well.skipped": b"1", b"duty.badly.left": b"1"}
    assert counted() == expected, "its lease is that of the ledger"
    monkeypatch.setattr(runner.election, "_until", 0.0)
    runner._run([*duties, SUSPICION])
    assert runner._suspected
    expected |= {b"duty.well.left": b"1", b"duty.badly.left": b"2", b"duty.suspicion.left": b"1"}
    assert counted() == expected
