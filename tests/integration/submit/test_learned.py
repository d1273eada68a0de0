"""Run times are learned from jobs that ended, and given to later jobs of their task."""

from __future__ import annotations

from typing import Final

import pytest
from sqlalchemy import text

from celery_capacity.routing.model.expected import RunTime
from celery_capacity.routing.model.request import timed
from tests.fixtures.jobs.submitting import Submitter
from tests.fixtures.processes.platforms import Platform
from tests.fixtures.waiting import until

ADD: Final = "tests.fixtures.tasks.add"
ONE: Final = "cpus=1000,slots=1"


@pytest.fixture
def platform_environment(platform_environment: dict[str, str]) -> dict[str, str]:
    return {**platform_environment, "PLATFORM_LEARN_RUN_TIMES": "on"}


def stored(platform: Platform) -> int:
    """Return the learned time of the task."""
    with platform.engine.connect() as connection:
        return int(connection.execute(text("SELECT coalesce(max(expected_ms), 0) FROM run_times")).scalar_one())


def test_jobs_get_the_time_that_others_of_their_task_took(platform: Platform, submitter: Submitter) -> None:
    platform.worker("a", cpus=4, pool="threads")
    jobs = [submitter.send(ADD, 1, 2) for _ in range(6)]
    assert {submitter.ended(job).expected_ms for job in jobs} == {0}

    learned = until(lambda: stored(platform), lambda: f"the duty learned the time: {stored(platform)}")
    usual = timed(ONE, RunTime(learned, learned))
    # This process reads the table every other sweep. The jobs go by a template of their messages.
    later = until(lambda: (row := submitter.ended(submitter.send(ADD, 1, 2))).expected_ms and row, "a job has the time")
    assert (later.expected_ms, later.shape) == (learned, usual)
    stated = submitter.ended(submitter.send(ADD, 1, 2, expected="10m"))
    assert stated.expected_ms == 600_000
    many = submitter.app.submit_many(ADD, [(1, 2)] * 3)
    assert {submitter.ended(result.id).shape for result in many} == {usual}
