"""A worker with PLATFORM_LIFETIME takes jobs that end in time, says how long it lives, and drains at its end."""

from __future__ import annotations

import json

from celery_capacity.routing.inspect.explain import explain
from celery_capacity.routing.model.reasons import Reason
from celery_capacity.workers.process.exit_codes import Exit
from tests.fixtures import tasks
from tests.fixtures.jobs.submitting import Submitter
from tests.fixtures.processes.platforms import Platform
from tests.fixtures.waiting import until

ADD = "tests.fixtures.tasks.add"
HOLD = "tests.fixtures.tasks.hold"


def test_job_that_would_not_end_in_time_waits_for_another_worker(platform: Platform, submitter: Submitter) -> None:
    platform.worker("short", cpus=2, pool="threads", PLATFORM_LIFETIME="1h")
    in_time = submitter.send(ADD, 1, 2, expected="10m")
    assert submitter.ended(in_time).worker == "short"
    too_long = submitter.send(ADD, 1, 2, expected="2h")
    limited = submitter.send(ADD, 1, 2, expected="10m", time_limit=7200)
    for job in (too_long, limited):
        with platform.engine.connect() as connection:
            explanation = explain(platform.redis, connection, job)
        assert explanation is not None and explanation.why is Reason.NO_TIME
    (line,) = json.loads(platform.celery("cluster", "--json").stdout)["workers"]
    assert 3000 < line["left_seconds"] <= 3600
    assert "left" in platform.celery("cluster").stdout
    platform.worker("long", cpus=2, pool="threads")
    assert {submitter.ended(job).worker for job in (too_long, limited)} == {"long"}


def test_worker_drains_at_the_end_of_its_life(platform: Platform, submitter: Submitter) -> None:
    worker = platform.worker("a", cpus=2, PLATFORM_LIFETIME="12s")
    job = submitter.send(HOLD, "gate")
    tasks.started(platform.redis, "gate")
    worker.wait_for("PLATFORM_LIFETIME is over: this worker drains")
    until(lambda: submitter.view("a").get("status") in (None, "draining"), "the worker drains")
    tasks.let_go(platform.redis, "gate")
    assert submitter.ended(job).state == "succeeded"
    assert worker.wait() == 0


def test_worker_refuses_to_start_after_the_end_of_its_life(platform: Platform) -> None:
    worker = platform.worker("late", ready=False, PLATFORM_LIFETIME="2020-01-01T00:00:00Z")
    worker.wait_for("PLATFORM_LIFETIME=2020-01-01 00:00:00+00:00 is over")
    assert worker.wait() == Exit.CONFIGURATION
