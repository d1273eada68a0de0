"""The ledger has the cordons and pauses of Postgres: after an action, a crash, a loss of Redis, and damage."""

from __future__ import annotations

from typing import Any, Final
from unittest.mock import Mock

import pytest
from celery import Celery

from celery_capacity.routing.errors import StoreUnavailable
from celery_capacity.routing.inspect import backlog_limit, verify
from celery_capacity.routing.ledger import keys
from celery_capacity.routing.ledger.replies import LedgerClosed
from celery_capacity.routing.model.amounts import LABEL
from celery_capacity.routing.model.states import State
from celery_capacity.routing.policy.pauses import Scope
from celery_capacity.routing.policy.placement import order
from celery_capacity.routing.recovery import controls, rebuild, reconcile
from celery_capacity.routing.store import controls as stored
from celery_capacity.workers.app.install import create_app
from celery_capacity.workers.client import controls as client
from celery_capacity.workers.duties import controls as duty
from celery_capacity.workers.process.stores import transactions
from tests.fixtures.stores.books import MESSAGE
from tests.fixtures.stores.staged import Stage

MAIL: Final = Scope.of(queue="mail")


def note(stage: Stage, *, worker: str = "", scope: Scope | None = None) -> None:
    """Cordon a worker or pause a scope in Postgres alone, as a program that died in between leaves them."""
    with transactions(stage.engine).begin() as connection:
        stored.lock(connection)
        if worker:
            stored.cordon(connection, [worker], "ann@desk", "fan")
        if scope is not None:
            stored.pause(connection, scope, "ann@desk", None)


def app_of(stage: Stage) -> Celery:
    return create_app("controls", resolve=lambda _: stage.settings)


def status(stage: Stage, worker: str) -> str:
    value: Any = stage.redis.hget(keys.book(worker), "cordoned")
    return (value or b"").decode()


def test_duty_copies_an_action_whose_program_died(stage: Stage) -> None:
    stage.worker("a", cpus=4000)
    note(stage, worker="a", scope=MAIL)
    app = app_of(stage)
    app.platform.ledger.epoch = stage.ledger.epoch
    assert duty.run_once(app, app.platform) == {"copied": 2}
    assert duty.run_once(app, app.platform) == {"copied": 0}
    assert (status(stage, "a"), stage.redis.zcard(keys.FREE)) == ("cordoned", 0)
    assert stage.submit(cpus=1000) and stage.ledger.fill("a") == 0
    app.platform.engine.dispose()
    stage.sql("UPDATE jobs SET revoked_at = now()")


def test_worker_kept_for_a_job_that_is_paused_takes_others_at_once(stage: Stage) -> None:
    stage.worker("a", cpus=4000, queues=("celery", "mail"))
    running = stage.submit(cpus=1000)
    stage.start(running)
    last = stage.insert({"cpus": 1000, f"{LABEL}mail": 1})
    stage.sql("UPDATE jobs SET losses = 2 WHERE id = :id", id=last)
    row = stage.row(last)
    stage.ledger.submit(last, row.shape, order(0, row.seq), MESSAGE, losses=row.losses)
    stage.ledger.fill("a")
    narrow = stage.submit(cpus=1000)
    assert (stage.ledger.kept_workers(), stage.row(narrow).state) == (["a"], "waiting")
    note(stage, scope=MAIL)
    assert controls.level(stage.engine, stage.ledger) == 1
    stage.apply()
    assert (stage.ledger.kept_workers(), stage.row(narrow).state) == ([], "admitted")
    stage.sql("UPDATE jobs SET revoked_at = now() WHERE id = :id", id=last)


def test_rebuild_opens_the_ledger_with_all_that_is_held_back(stage: Stage) -> None:
    stage.worker("a", cpus=4000)
    note(stage, worker="a", scope=Scope.of())
    controls.level(stage.engine, stage.ledger)
    job = stage.submit(cpus=1000)
    stage.redis.flushdb()
    opened = rebuild.open_if_cold(stage.engine, stage.ledger)
    assert opened is not None
    assert stage.redis.hget(keys.EPOCH, "paused") == b"all"
    assert stage.ledger.controls() == {("cordon", "a"): "cordoned", ("pause", "platform"): "1"}
    stage.worker("a", cpus=4000)
    assert (status(stage, "a"), stage.row(job).state) == ("cordoned", "waiting")
    assert controls.level(stage.engine, stage.ledger) == 0


def test_reconcile_repairs_controls_that_differ(stage: Stage) -> None:
    stage.worker("a", cpus=4000)
    stage.worker("b", cpus=4000)
    note(stage, worker="a", scope=MAIL)
    controls.level(stage.engine, stage.ledger)
    # A Redis that forgot its last writes, or a hand that deleted keys.
    stage.redis.delete(keys.CORDONS)
    stage.redis.hset(keys.CORDONS, "b", "cordoned")
    stage.redis.hset(keys.PAUSED, "task:tasks.render", "1")
    broken = verify.check(stage.engine, stage.redis, patience=0).lines()
    assert len(broken) == 5, broken
    done = reconcile.reconcile(stage.engine, stage.ledger)
    assert (done.found["a cordon or a pause that only one store has"], done.all_repaired) == (3, True)
    assert (status(stage, "a"), status(stage, "b")) == ("cordoned", "")
    assert verify.check(stage.engine, stage.redis, patience=0).holds


def test_reconcile_lets_a_shape_go_that_no_pause_holds_back(stage: Stage) -> None:
    stage.worker("a", cpus=1000)
    first, job = stage.submit(cpus=1000), stage.submit(cpus=1000)
    note(stage, scope=Scope.of(queue="celery"))
    controls.level(stage.engine, stage.ledger)
    stage.start(first)
    stage.end(first)
    assert stage.redis.scard(keys.WITHHELD) == 1
    # The resume died before it let the shape go.
    stage.sql("DELETE FROM pauses")
    stage.redis.delete(keys.PAUSED)
    stage.redis.hdel(keys.EPOCH, "paused")
    assert [line for line in verify.check(stage.engine, stage.redis, patience=0).lines() if "without a pause" in line]
    done = reconcile.reconcile(stage.engine, stage.ledger)
    assert done.found["a shape held back without a pause"] == 1
    stage.apply()
    assert stage.row(job).state == "admitted"


def test_older_copy_is_refused_and_changes_nothing(stage: Stage) -> None:
    assert stage.ledger.set_controls(7, {("cordon", "a"): "cordoned"}, last=True)
    assert not stage.ledger.set_controls(6, {("cordon", "a"): ""}, last=True)
    assert (stage.ledger.controls(), stage.ledger.controls_version()) == ({("cordon", "a"): "cordoned"}, 7)
    stage.ledger.set_controls(7, {("cordon", "a"): ""}, last=True)
    stage.redis.hset(keys.EPOCH, "controls", 0)


def test_copy_waits_until_the_ledger_is_open(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    app, closed = app_of(stage), [LedgerClosed(None), LedgerClosed(None)]
    level = controls.level

    def once_open(engine: Any, ledger: Any) -> int:
        if closed:
            raise closed.pop()
        return level(engine, ledger)

    monkeypatch.setattr(client, "level", once_open)
    assert client.pause(app.platform, MAIL, by="ann").applied
    assert stage.ledger.controls() == {("pause", "queue:mail"): "1"}
    app.platform.engine.dispose()


def test_action_without_redis_is_kept_for_later(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    app = app_of(stage)
    monkeypatch.setattr(client, "APPLY_WITHIN", 0.0)

    def closed(*_: Any) -> int:
        raise LedgerClosed(None)

    monkeypatch.setattr(client, "level", closed)
    order = client.pause(app.platform, MAIL, reason="disk", by="ann")
    assert (order.applied, order.pause and order.pause.reason) == (False, "disk")
    assert controls.level(stage.engine, stage.ledger) == 1
    app.platform.engine.dispose()


def test_every_action_is_noted_with_its_operator(stage: Stage) -> None:
    stage.worker("a", cpus=1000)
    app = app_of(stage)
    platform = app.platform
    client.cordon(platform, ["a"], reason="fan", by="ann")
    client.cordon(platform, ["a"], drains=True, deadline=600.0, stops=True)
    client.uncordon(platform, ["a"], by="bob")
    client.pause(platform, Scope.of(task="tasks.render"), by="ann")
    client.resume(platform, Scope.of(task="tasks.render"), by="ann")
    with stage.engine.connect() as connection:
        rows = connection.exec_driver_sql(
            "SELECT action, target, made_by, reason, details FROM operator_actions ORDER BY seq"
        ).all()
    assert [tuple(row) for row in rows] == [
        ("cordon", "a", "ann", "fan", None),
        ("drain", "a", client.operator(), None, {"deadline_seconds": 600.0, "stop": True}),
        ("uncordon", "a", "bob", None, None),
        ("pause", "task:tasks.render", "ann", None, None),
        ("resume", "task:tasks.render", "ann", None, None),
    ]
    app.platform.engine.dispose()


def test_duty_lets_jobs_go_whose_resume_died_in_between(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.worker("a", cpus=1000)
    note(stage, scope=Scope.of())
    controls.level(stage.engine, stage.ledger)
    job = stage.submit(cpus=1000)
    with transactions(stage.engine).begin() as connection:
        stored.lock(connection)
        assert stored.resume(connection, Scope.of(), "ann@desk")
    with monkeypatch.context() as patched:
        patched.setattr(stage.ledger, "resume_shapes", Mock(side_effect=StoreUnavailable("Redis does not answer")))
        with pytest.raises(StoreUnavailable):
            controls.level(stage.engine, stage.ledger)
    app = app_of(stage)
    app.platform.ledger.epoch = stage.ledger.epoch
    duty.run_once(app, app.platform)
    stage.apply()
    assert (stage.row(job).state, stage.redis.scard(keys.WITHHELD)) == ("admitted", 0)
    assert controls.is_level(stage.engine, stage.ledger)
    app.platform.engine.dispose()


def test_verify_holds_while_paused_jobs_come_and_go(stage: Stage) -> None:
    stage.worker("a", cpus=1000)
    stage.submit(cpus=1000)
    stage.submit(cpus=1000)
    note(stage, scope=Scope.of())
    controls.level(stage.engine, stage.ledger)
    # This job comes before the one by which the shape stands in the indexes.
    stage.submit(cpus=1000, priority=9)
    assert verify.check(stage.engine, stage.redis, patience=0).lines() == []
    # Another shape is filed under the pause, and its first job ends.
    first = stage.submit(cpus=500)
    stage.submit(cpus=500)
    assert stage.ledger.cancel(first, State.CANCELLED, "revoked").entry is not None
    stage.apply()
    assert verify.check(stage.engine, stage.redis, patience=0).lines() == []
    assert reconcile.reconcile(stage.engine, stage.ledger).drift == 0


def test_paused_jobs_count_for_the_limit_of_the_backlog(stage: Stage) -> None:
    note(stage, scope=Scope.of())
    controls.level(stage.engine, stage.ledger)
    for _ in range(2):
        stage.submit(cpus=1000)
    assert backlog_limit.waiting_in_ledger(stage.ledger) == 2
