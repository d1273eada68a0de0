"""Jobs that ended lately come back as a trace, from the rows of jobs and from the archive."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import text

from celery_capacity.routing.errors import InvalidRequest
from celery_capacity.routing.forecast.history import read_history
from celery_capacity.routing.model.expected import RunTime
from celery_capacity.routing.model.request import Request, alternatives_term
from celery_capacity.routing.policy.labels import Place, place_of_options
from celery_capacity.routing.store.archive import archive_finished
from tests.fixtures.stores.staged import Stage


def test_history_has_ended_jobs_with_their_tenants_and_requests(stage: Stage) -> None:
    stage.worker("a", cpus=4000)
    first = stage.submit(cpus=1000, tenant="physics", run_time=RunTime(76_109, 76_109))
    second, waiting = stage.submit(cpus=3000), stage.submit(cpus=4000)
    for job in (first, second):
        stage.start(job)
        stage.end(job)
    stage.apply()
    with stage.engine.connect() as connection:
        history = read_history(connection, 3600.0)
    assert [(job.request.get("cpus"), job.terms) for job in history.jobs] == [(1000, ",$physics"), (3000, "")]
    assert (history.jobs[0].at, history.cut) == (0, False)
    assert all(job.run >= 1 and job.task == "task" for job in history.jobs)
    with stage.engine.connect() as connection:
        newest = read_history(connection, 3600.0, most=1)
    assert ([job.request.get("cpus") for job in newest.jobs], newest.cut) == ([3000], True)
    stage.start(waiting)
    stage.end(waiting)


def test_history_has_all_alternatives_of_a_job(stage: Stage) -> None:
    stage.worker("a", cpus=4000)
    term = alternatives_term([Request.of({"cpus": 1000, "gpus": 1}), Request.of({"cpus": 4000})])
    job = stage.submit(cpus=1000, gpus=1, place=term)
    stage.start(job)
    stage.end(job)
    stage.apply()
    with stage.engine.connect() as connection:
        (entry,) = read_history(connection, 3600.0).jobs
    assert (dict(entry.request.amounts), entry.terms) == ({"cpus": 1000, "gpus": 1, "slots": 1}, term)


_GPU_OR_CPUS = alternatives_term([Request.of({"cpus": 1000, "gpus": 1}), Request.of({"cpus": 4000})])


@pytest.mark.parametrize(
    ("terms", "amounts"),
    [
        ({}, {"cpus": 1000}),
        ({"tenant": "physics"}, {"cpus": 1000, "licence": 1}),
        ({"place": Place(exclusive=True).terms}, {"cpus": 1000, "alone": 1}),
        ({"place": Place(spread=True).terms}, {"cpus": 1000}),
        ({"place": place_of_options({"where": {"arch": "aarch64", "disk": "!=hdd"}}).terms}, {"cpus": 1000}),
        ({"place": Place(worker="a").terms}, {"cpus": 1000}),
        ({"place": _GPU_OR_CPUS}, {"cpus": 1000, "gpus": 1}),
        ({"place": _GPU_OR_CPUS, "tenant": "physics"}, {"cpus": 1000, "gpus": 1}),
        ({"run_time": RunTime(76_109, 76_109)}, {"cpus": 1000}),
        ({"run_time": RunTime(76_109, 655_360)}, {"cpus": 1000}),
    ],
    ids=[
        *("plain", "tenant", "exclusive", "spread", "where", "worker"),
        *("alternatives", "tenant-and-alternatives", "expected", "limited"),
    ],
)
def test_job_has_one_trace_before_and_after_its_archiving(stage: Stage, terms: Any, amounts: Any) -> None:
    stage.worker("a", cpus=4000, licence=1, labels={"arch": "aarch64", "disk": "ssd"})
    job = stage.submit(priority=3, **terms, **amounts)
    stage.start(job)
    stage.end(job)
    stage.apply()
    stage.sql("UPDATE jobs SET outbox = NULL")
    with stage.engine.begin() as connection:
        before = read_history(connection, 3600.0)
        assert archive_finished(connection, 0.0, 10) == 1
        after = read_history(connection, 3600.0)
    assert after == before
    assert dict(after.jobs[0].request.amounts) == {**amounts, "slots": 1}


def test_job_archived_before_its_shape_was_kept_may_run_anywhere(stage: Stage) -> None:
    stage.worker("a", cpus=4000)
    job = stage.submit(cpus=1000, tenant="physics")
    stage.start(job)
    stage.end(job)
    stage.apply()
    stage.sql("UPDATE jobs SET outbox = NULL")
    with stage.engine.begin() as connection:
        assert archive_finished(connection, 0.0, 10) == 1
        connection.execute(text("UPDATE jobs_archive SET shape = NULL, expected_ms = NULL"))
        history = read_history(connection, 3600.0)
    assert [(entry.request.get("cpus"), entry.terms) for entry in history.jobs] == [(1000, "")]


def test_empty_history_is_refused_with_advice(stage: Stage) -> None:
    with stage.engine.connect() as connection, pytest.raises(InvalidRequest, match="--trace FILE"):
        read_history(connection, 3600.0)
