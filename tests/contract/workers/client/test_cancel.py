"""The answer of a cancel about a job that another process ends at the same moment."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from celery_capacity.routing.model.states import State
from celery_capacity.routing.store.job_transitions import REVOKED
from celery_capacity.workers.client.cancel import Became, cancel
from celery_capacity.workers.process.stores import Stores
from tests.fixtures.stores.staged import Stage


def ended_by_another_process(stage: Stage) -> Any:
    """Return an app whose revoke finds that a sweep has just ended the jobs, with rows that do not follow yet."""

    def revoke(jobs: Sequence[str], **_: Any) -> None:
        for job in jobs:
            stage.ledger.cancel(job, State.CANCELLED, REVOKED)

    return SimpleNamespace(control=SimpleNamespace(revoke=revoke))


def test_job_is_cancelled_before_its_row_says_so(stage: Stage, stores: Stores) -> None:
    job = stage.submit(cpus=1000)
    (cancelled,) = cancel(ended_by_another_process(stage), stores, [job])
    assert stage.row(job).state == "waiting"
    assert (cancelled.became, cancelled.state) == (Became.CANCELLED, State.CANCELLED)
    stage.apply()
    (again,) = cancel(ended_by_another_process(stage), stores, [job])
    assert (again.became, again.state) == (Became.ENDED_BEFORE, State.CANCELLED)
