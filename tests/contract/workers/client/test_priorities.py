"""A job on its way to the ledger takes a new priority along, however its steps and the operator's interleave."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy import Connection

from celery_capacity.routing.database.authority import Authority, read_authority
from celery_capacity.routing.model.job import NewJob
from celery_capacity.routing.recovery import resubmit
from celery_capacity.routing.store import backlog
from celery_capacity.workers.client import priorities
from celery_capacity.workers.process.stores import Stores
from celery_capacity.workers.submit.sender import Sender
from tests.fixtures.stores.staged import MESSAGE, Stage


def test_last_step_has_a_priority_set_between_its_read_and_its_filing(
    stage: Stage, stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.worker("a", cpus=1000)
    job = stage.submit(cpus=1000)
    stage.start(job)
    stage.end(job, "replaced")
    stage.start(other := stage.submit(cpus=1000))
    rival = stage.submit(cpus=1000, priority=5)
    submit_rows = resubmit.submit_rows

    def set_first(*arguments: Any) -> int:
        priorities.set_priority(stores, [job], 7)
        return submit_rows(*arguments)

    # The sender is slower than the operator is patient.
    monkeypatch.setattr(priorities, "AGAIN_AFTER", ())
    monkeypatch.setattr(resubmit, "submit_rows", set_first)
    last = NewJob(job, "task", stage.row(rival).shape, MESSAGE, nesting=1, priority=3)
    Sender(stores, "celery").store(last, None)
    stage.apply()
    assert stage.row(job).priority == 7
    stage.end(other)
    assert [stage.row(name).state for name in (job, rival)] == ["admitted", "waiting"]


def test_due_retry_has_a_priority_set_between_its_read_and_its_filing(
    stage: Stage, stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.worker("a", cpus=1000)
    job = stage.insert({"cpus": 1000}, due_at=datetime.now(UTC))
    stage.start(other := stage.submit(cpus=1000))
    rival = stage.submit(cpus=1000, priority=5)
    with stage.engine.connect() as connection:
        rows = backlog.these(connection, [job])
    looks: list[Authority] = []

    def file_before_second_look(connection: Connection) -> Authority:
        if looks:
            resubmit.submit_rows(stage.ledger, rows)
        looks.append(read_authority(connection))
        return looks[-1]

    monkeypatch.setattr(priorities, "read_authority", file_before_second_look)
    priorities.set_priority(stores, [job], 7)
    stage.apply()
    stage.end(other)
    assert [stage.row(name).state for name in (job, rival)] == ["admitted", "waiting"]
