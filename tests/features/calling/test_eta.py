"""`eta`, `countdown` and `expires` with a worker: due times are in Postgres, and no worker keeps them."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Final

import psutil
import pytest
from celery.exceptions import TaskRevokedError
from sqlalchemy import text

from celery_capacity.routing.config.embedded import Pair
from celery_capacity.routing.config.settings import Settings
from tests.fixtures import tasks
from tests.fixtures.jobs.submitting import Submitter, standing_platform
from tests.fixtures.processes.platforms import Platform, Process

ADD = "tests.fixtures.tasks.add"
HOLD = "tests.fixtures.tasks.hold"
#: Jobs that are not due.
MANY: Final = 100_000
#: Bytes by which a worker's memory may differ because of its other work. A Celery object for each job would take a
#: kilobyte and more: 100 MB.
FLAT: Final = 16 * 2**20


@pytest.fixture(scope="module")
def worker(platform: Platform) -> Process:
    return platform.processes[0]


@pytest.fixture(scope="module")
def platform(server_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    with standing_platform(server_pair, tmp_path_factory.mktemp("eta")) as running:
        running.worker("a", cpus=2, pool="threads")
        yield running


def test_a_hundred_thousand_jobs_that_are_not_due_leave_a_worker_as_it_is(
    platform: Platform, submitter: Submitter, worker: Process
) -> None:
    process = psutil.Process(worker.pid)
    sample = submitter.send(ADD, 1, 2, countdown=3600)
    assert submitter.value(submitter.send(ADD, 1, 2, countdown=0.2)) == 3
    before = process.memory_info().rss
    with platform.engine.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO jobs (id, name, state, request, shape, queue, message, due_at) SELECT 'many-' || n, name,"
                " state, request, shape, queue, message, now() + make_interval(secs => 3600 + n)"
                " FROM jobs, generate_series(1, :many) n WHERE id = :sample"
            ),
            {"many": MANY, "sample": sample},
        )
    # Passes of the duty go by, and find the due jobs among the others.
    for _ in range(3):
        due = datetime.now(UTC) + timedelta(seconds=0.3)
        job = submitter.send(ADD, 1, 2, eta=due)
        assert submitter.value(job) == 3
        assert submitter.ended(job).started_at >= due
    assert process.memory_info().rss - before < FLAT
    with platform.engine.begin() as connection:
        assert connection.execute(text("DELETE FROM jobs WHERE state = 'scheduled'")).rowcount == MANY + 1


def test_the_duty_looks_every_second_unless_it_is_told_otherwise() -> None:
    """A job thus starts within a second of its time, where there is room."""
    assert Settings.from_environ({}).due_interval == 1.0


def test_job_that_expires_before_admission_or_its_time_never_starts(platform: Platform, submitter: Submitter) -> None:
    full = submitter.send(HOLD, "full", cpus=2)
    tasks.started(platform.redis, "full")
    waits = submitter.send(ADD, 1, 2, expires=0.5)
    later = submitter.send(ADD, 1, 2, countdown=3600, expires=0.5)
    for job in (waits, later):
        row = submitter.ended(job)
        assert (row.state, row.attempt, row.error) == ("expired", 0, "expired")
        with pytest.raises(TaskRevokedError, match="expired"):
            submitter.value(job)
    tasks.let_go(platform.redis, "full")
    assert submitter.ended(full).state == "succeeded"


def test_a_job_that_runs_does_not_expire(platform: Platform, submitter: Submitter) -> None:
    job = submitter.send(HOLD, "runs", expires=1)
    tasks.started(platform.redis, "runs")
    passes = submitter.send(ADD, 1, 2, expires=datetime.now(UTC) - timedelta(seconds=1))
    assert submitter.ended(passes).state == "expired"
    over = submitter.send(ADD, 1, 2, countdown=1.2)
    assert submitter.value(over) == 3
    tasks.let_go(platform.redis, "runs")
    assert submitter.ended(job).state == "succeeded"
