"""Ended jobs that are run again as new jobs: what comes along, what does not, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from celery import chain, chord
from sqlalchemy import text

import celery_capacity
from celery_capacity import Job, NotRetried
from celery_capacity.routing.config.embedded import Pair
from celery_capacity.routing.store import archive
from tests.fixtures.jobs.submitting import Submitter, standing_platform
from tests.fixtures.processes.platforms import Platform
from tests.fixtures.waiting import until

ADD, FAIL = "tests.fixtures.tasks.add", "tests.fixtures.tasks.fail"
FAIL_ONCE = "tests.tasks.reporting.fail_once"
LONG = 30.0


@pytest.fixture(scope="module")
def platform(server_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    with standing_platform(server_pair, tmp_path_factory.mktemp("retrying"), "tests.tasks.reporting") as running:
        running.worker("a", cpus=4, pool="threads")
        yield running


def handle(submitter: Submitter, job: str) -> Job:
    return celery_capacity.job(job, app=submitter.app)


def failed(submitter: Submitter, job: str) -> Job:
    assert submitter.ended(job).state == "failed"
    return handle(submitter, job)


def test_rest_of_a_chain_follows_the_retry(submitter: Submitter) -> None:
    first = submitter.app.signature(FAIL_ONCE, ("chain", 1))
    result = chain(first, submitter.app.signature(ADD, (10,))).apply_async()
    old = failed(submitter, result.parent.id)
    assert old.retry().result(timeout=LONG) == 1
    # The later step has the id that its caller knows. Celery stored a failure for it when the first step failed.
    assert handle(submitter, result.id).wait(timeout=LONG).state == "succeeded"
    until(lambda: submitter.result(result.id).state == "SUCCESS", "its result replaces the failure")
    assert submitter.value(result.id) == 11


def test_retry_starts_at_once_and_counts_anew(submitter: Submitter) -> None:
    old = failed(submitter, submitter.send(FAIL, "later", countdown=0.2, expires=60, retries=2))
    new = old.retry()
    assert new.wait(timeout=LONG).state == "failed"
    row = submitter.ended(new.id)
    assert (row.due_at, row.expires_at, row.retries, row.nesting, row.root_id, row.parent_id) == (
        None, None, 0, 0, new.id, None,
    )  # fmt: skip


def test_part_of_a_chord_is_refused_and_its_body_is_not(submitter: Submitter) -> None:
    header = [submitter.app.signature(ADD, (1, 1)), submitter.app.signature(FAIL, ("part",))]
    result = chord(header, submitter.app.signature("tests.tasks.canvas.total")).apply_async()
    part = failed(submitter, result.parent.results[1].id)
    with pytest.raises(NotRetried, match="is part of a chord"):
        part.retry(again=True)
    body = chord([submitter.app.signature(ADD, (1, 1))], submitter.app.signature(FAIL_ONCE, ("body",))).apply_async()
    assert failed(submitter, body.id).retry().result(timeout=LONG) == [2]


def test_archived_job_is_refused(submitter: Submitter, platform: Platform) -> None:
    old = failed(submitter, submitter.send(FAIL, "archived"))
    until(lambda: submitter.row(old.id).outbox is None, "its result is delivered")
    with platform.engine.begin() as connection:
        connection.execute(
            text("UPDATE jobs SET finished_at = finished_at - interval '1 day' WHERE id = :id"), {"id": old.id}
        )
        archive.archive_finished(connection, 3600, 1000)
    with pytest.raises(NotRetried, match="is archived, and its message is gone"):
        old.retry()


def test_retry_is_admitted_while_postgres_decides(submitter: Submitter, platform: Platform) -> None:
    old = failed(submitter, submitter.send(FAIL_ONCE, "postgres", 5))
    with platform.engine.begin() as connection:
        connection.execute(text("UPDATE authority SET authority = 'postgres', epoch = epoch + 1, changed_at = now()"))
    assert old.retry().result(timeout=LONG) == 5
    assert handle(submitter, submitter.send(ADD, 1, 2, countdown=3600)).cancel().became == "cancelled"
