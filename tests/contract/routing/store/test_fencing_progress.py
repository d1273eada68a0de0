"""Progress in a job's row: of the newest attempt alone, whichever store decides."""

from __future__ import annotations

from typing import Any

from celery_capacity.routing.inspect import job_list
from celery_capacity.routing.inspect.job_list import JobFilter
from celery_capacity.routing.model.job import Publisher
from celery_capacity.routing.model.token import Token
from celery_capacity.routing.store import queries
from celery_capacity.routing.store.fencing import write_progress
from tests.fixtures.stores.authorities import Authority

HALF = {"current": 1, "total": 2, "message": None, "at": "2026-05-04T12:00:00.000+00:00"}
DONE = {**HALF, "current": 2}


def report(authority: Authority, by: Publisher, progress: dict[str, Any]) -> bool:
    with authority.stage.engine.connect() as connection:
        return write_progress(connection, by, progress)


def shown(authority: Authority, job: str) -> Any:
    """Return the progress that `job` shows, which is also that of the list and of `wait`."""
    authority.stage.apply()
    with authority.stage.engine.connect() as connection:
        file = queries.find(connection, job)
        assert file is not None
        progress = file.job["progress"]
        assert queries.progress_of(connection, [job]).get(job) == progress
        listed = {line["id"]: line["progress"] for line in job_list.newest(connection, JobFilter(), 10).lines}
    assert listed[job] == progress
    return progress


def running(authority: Authority) -> tuple[str, Publisher]:
    authority.worker("a", cpus=4000)
    job = authority.submit(cpus=1000)
    assert authority.starts("a") == [job]
    return job, attempt_of(authority, job)


def attempt_of(authority: Authority, job: str) -> Publisher:
    row = authority.row(job)
    return Publisher(job, Token(row.epoch, row.attempt), row.incarnation)


def test_newest_report_stands_and_stays_after_the_end(authority: Authority) -> None:
    job, attempt = running(authority)
    assert shown(authority, job) is None
    assert report(authority, attempt, HALF)
    assert shown(authority, job) == HALF
    assert report(authority, attempt, DONE)
    assert authority.end(job) == "released"
    assert shown(authority, job) == DONE
    # An ended job takes no report.
    assert not report(authority, attempt, HALF)
    assert shown(authority, job) == DONE


def test_progress_of_a_lost_attempt_starts_anew(authority: Authority) -> None:
    job, first = running(authority)
    assert report(authority, first, DONE)
    authority.lose("a")
    assert authority.waits(job)
    assert shown(authority, job) is None
    # The lost attempt runs on somewhere, and writes nothing any more.
    assert not report(authority, first, HALF)
    authority.worker("b", cpus=4000)
    assert authority.starts("b") == [job]
    assert shown(authority, job) is None
    assert not report(authority, first, DONE)
    second = attempt_of(authority, job)
    assert second.token > first.token
    assert report(authority, second, HALF)
    assert not report(authority, first, DONE)
    assert shown(authority, job) == HALF


def test_report_comes_before_the_row_knows_the_attempt(authority: Authority) -> None:
    job, attempt = running(authority)
    # Rows follow the ledger a moment later.
    before = {name: getattr(authority.row(job), name) for name in ("state", "epoch", "attempt", "step")}
    put = "UPDATE jobs SET state = :state, epoch = :epoch, attempt = :attempt, step = :step WHERE id = :id"
    authority.stage.sql(put, id=job, state="accepted", epoch=0, attempt=0, step=0)
    assert report(authority, attempt, HALF)
    with authority.stage.engine.connect() as connection:
        assert queries.progress_of(connection, [job]) == {job: HALF}
    older = Publisher(job, Token(0, 1), attempt.incarnation)
    assert not report(authority, older, DONE)
    authority.stage.sql(put, id=job, **before)
