"""The duty that notes estimated starts, and compares them with the real ones."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import text

from celery_capacity.routing.forecast import record
from celery_capacity.routing.forecast.record import Errors
from celery_capacity.routing.model.expected import RunTime
from celery_capacity.workers.learning import estimates as duty
from celery_capacity.workers.process.stores import Stores
from tests.fixtures.stores.staged import Stage

NO_APP: Any = None
MINUTE = RunTime(76_109, 76_109)


def test_duty_notes_estimates_and_compares_them_with_the_starts(stage: Stage, stores: Stores) -> None:
    stage.worker("a", cpus=4000)
    first = stage.submit(cpus=4000, run_time=MINUTE)
    second = stage.submit(cpus=4000, run_time=MINUTE)
    stage.submit(cpus=4000, run_time=MINUTE)
    stage.apply()
    assert duty.run_once(NO_APP, stores) == {"compared": 0, "noted": 2}
    assert duty.run_once(NO_APP, stores) == {"compared": 0, "noted": 0}
    stage.start(first)
    stage.end(first)
    stage.start(second)
    assert duty.run_once(NO_APP, stores)["compared"] == 1
    with stage.engine.connect() as connection:
        errors = record.errors(connection)
    assert errors is not None and errors.compared == 1
    assert errors.median == errors.p90 == pytest.approx(MINUTE.expected / 1000, abs=20)


def test_estimates_of_ended_jobs_are_void_and_old_ones_go(
    stage: Stage, stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "KEPT", 1)
    stage.sql(
        "INSERT INTO estimates (job, starts_at, started_at) VALUES ('gone', now(), null),"
        " ('new', now(), now()), ('old', now(), now() - interval '1 h')"
    )
    with stage.engine.connect() as connection:
        assert record.note(connection, {"gone": 5, "open": 7}) == 1
        assert record.compare(connection) == 0
        assert record.errors(connection) == Errors(2, 0.0, 3600.0)
    with stage.engine.connect() as connection:
        assert not record.is_full(connection)


def test_estimate_of_a_paused_job_is_void(stage: Stage, stores: Stores) -> None:
    stage.worker("a", cpus=4000)
    for _ in range(3):
        stage.submit(cpus=4000, run_time=MINUTE)
    stage.apply()
    assert duty.run_once(NO_APP, stores)["noted"] == 2
    stage.sql("INSERT INTO pauses (kind, name, made_by) VALUES ('platform', '', 'ann@desk')")
    duty.run_once(NO_APP, stores)
    with stage.engine.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM estimates")).scalar_one() == 0
    stage.sql("DELETE FROM pauses")


def test_no_estimate_is_noted_while_many_are_open(
    stage: Stage, stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "MAX_OPEN", 1)
    stage.worker("a", cpus=4000)
    for _ in range(4):
        stage.submit(cpus=4000, run_time=MINUTE)
    stage.apply()
    with stage.engine.connect() as connection:
        record.note(connection, {"job-2": 5})
    assert duty.run_once(NO_APP, stores)["noted"] == 0


def test_no_estimate_is_noted_without_workers_or_jobs(stage: Stage, stores: Stores) -> None:
    assert duty.run_once(NO_APP, stores)["noted"] == 0
    stage.worker("a", cpus=4000)
    assert duty.run_once(NO_APP, stores)["noted"] == 0
