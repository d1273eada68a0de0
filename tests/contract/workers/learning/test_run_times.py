"""The duty that learns run times keeps up with jobs that end, however many they are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from celery_capacity.routing.store import run_times
from celery_capacity.workers.learning import run_times as duty
from celery_capacity.workers.process.stores import Stores
from tests.fixtures.stores.staged import Stage

NO_APP: Any = None


def end_some_time_ago(stage: Stage, number: int) -> None:
    """Insert jobs that ended, one after the other."""
    stage.sql(
        "INSERT INTO jobs (id, name, state, shape, request, queue, message, started_at, finished_at) SELECT n::text,"
        " 'task', 'succeeded', 'cpus=1000,slots=1', '{}', 'celery', '', now() - interval '1 minute',"
        " now() - interval '20 s' + n * interval '1 ms' FROM generate_series(1, :number) AS n",
        number=number,
    )


def learning(stores: Stores) -> Stores:
    stores._made["settings"] = replace(stores.settings, learn_run_times=True)
    return stores


def test_pass_reads_all_jobs_that_have_ended(stage: Stage, stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_times, "MAX_READ", 2)
    end_some_time_ago(stage, 9)
    assert duty.run_once(NO_APP, learning(stores)) == {"learned": 9}
    assert duty.run_once(NO_APP, stores) == {"learned": 0}


def test_pass_ends_in_time_and_the_next_goes_on(stage: Stage, stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_times, "MAX_READ", 2)
    monkeypatch.setattr(duty, "SECONDS", 0.0)
    end_some_time_ago(stage, 3)
    assert [duty.run_once(NO_APP, learning(stores))["learned"] for _ in range(3)] == [2, 1, 0]


def test_nothing_is_learned_where_the_setting_is_off(stage: Stage, stores: Stores) -> None:
    end_some_time_ago(stage, 3)
    assert not stores.settings.learn_run_times
    assert duty.run_once(NO_APP, stores) == {"learned": 0}
