"""A job of a task that the submitter does not have is the same job, whether Redis answers or not."""

from __future__ import annotations

import json
import sys
from subprocess import run

import pytest
from sqlalchemy import text

from celery_capacity.platform.operations.submitting import Submission, submit_all
from celery_capacity.routing.database.audit import Actor, Way
from celery_capacity.routing.database.authority import read_authority
from celery_capacity.routing.model.message import HEADER, decode
from celery_capacity.routing.model.states import Store
from tests.faults.breaking.servers import Servers
from tests.fixtures.jobs.submitting import Submitter
from tests.fixtures.processes.platforms import ROOT, Platform
from tests.fixtures.waiting import until

pytestmark = pytest.mark.long

DECLARED = "tests.tasks.declared"
TASKS = ("placed", "alone", "four_and_two", "half_an_hour")


def by_command(platform: Platform, task: str) -> str:
    """Submit a task by `submit`, in a process that does not have it, and return the id of the job."""
    command = [sys.executable, "-m", "celery", "-A", "platform", "submit", f"{DECLARED}.{task}", "--json"]
    environment = {**platform.environment, "PLATFORM_IMPORTS": ""}
    done = run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return str(json.loads(done.stdout)["id"])


def by_api(submitter: Submitter, task: str) -> str:
    submission = Submission(f"{DECLARED}.{task}", (), {}, None, {})
    (made,) = submit_all(submitter.app, submitter.app.platform, Actor("ann", Way.API), [submission])
    assert made.refused is None
    return made.id


def until_declared(platform: Platform) -> None:
    """Wait until Postgres has the declarations of the worker."""
    with platform.engine.connect() as connection:
        query = text("SELECT count(*) FROM declarations WHERE name = :name")
        values = {"name": f"{DECLARED}.placed"}
        until(lambda: connection.execute(query, values).scalar_one(), "the declarations are in Postgres")


def asked_by(submitter: Submitter, job: str) -> tuple[object, ...]:
    """Return what the message of a job asks for: a row that is admitted has the alternative that it took."""
    row = submitter.row(job)
    return decode(bytes(row.message))["headers"][HEADER], row.expected_ms, row.declared


def bring_back(servers: Servers, platform: Platform) -> None:
    """Start Redis, and wait until the ledger decides: the invariants are checked after the test."""
    servers.start_redis()

    def decides() -> bool:
        with platform.engine.connect() as connection:
            return read_authority(connection).authority == Store.LEDGER

    until(decides, "the ledger decides")


def test_submission_by_name_is_complete_without_redis(
    servers: Servers, platform: Platform, submitter: Submitter
) -> None:
    platform.worker("a", cpus=8, pool="threads", PLATFORM_IMPORTS=DECLARED, PLATFORM_LABELS="arch=aarch64")
    until_declared(platform)
    with_redis = {task: asked_by(submitter, by_command(platform, task)) for task in TASKS}
    servers.kill_redis()
    submitter.app.amqp.routes[0].published.forget()
    for task in TASKS:
        for job in (by_command(platform, task), by_api(submitter, task)):
            assert asked_by(submitter, job) == with_redis[task]
            assert submitter.ended(job).state == "succeeded"
    bring_back(servers, platform)


def test_worker_that_starts_without_redis_declares_its_tasks(
    servers: Servers, platform: Platform, submitter: Submitter
) -> None:
    servers.kill_redis()
    platform.worker("a", cpus=8, pool="threads", PLATFORM_IMPORTS=DECLARED, PLATFORM_LABELS="arch=aarch64")
    until_declared(platform)
    job = by_command(platform, "placed")
    shape = submitter.row(job).shape
    assert all(term in shape for term in (",|", "?arch", "$physics", "~")), shape
    assert submitter.ended(job).state == "succeeded"
    bring_back(servers, platform)
