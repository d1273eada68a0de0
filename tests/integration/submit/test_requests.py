"""A job's request: declared with the task, passed with the call, known by name, and kept as long as the job lives."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import text

from celery_capacity import create_app
from celery_capacity.routing.config.embedded import Pair
from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.inspect import explain
from celery_capacity.routing.inspect.explanation import Explanation
from celery_capacity.routing.model import message
from celery_capacity.routing.model.message import HEADER
from celery_capacity.routing.model.reasons import Reason
from celery_capacity.workers.process.stores import platform_of
from tests.fixtures import tasks
from tests.fixtures.jobs.submitting import Submitter, standing_platform
from tests.fixtures.processes.platforms import READY, Platform, Process
from tests.fixtures.waiting import until
from tests.tasks import declared

DECLARED = declared.__name__
HOLD = "tests.fixtures.tasks.hold"


@pytest.fixture(scope="module")
def platform(server_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """Yield a platform with one worker `a` that has two licences and two GPUs."""
    with standing_platform(server_pair, tmp_path_factory.mktemp("requests"), DECLARED) as running:
        running.worker("a", cpus=8, pool="threads", PLATFORM_RESOURCES="licence=2", PLATFORM_GPUS="2")
        yield running


def why(platform: Platform, job: str) -> Explanation:
    with platform.engine.connect() as connection:
        explanation = explain.explain(platform.redis, connection, job)
    assert explanation is not None
    return explanation


def python(platform: Platform, code: str) -> str:
    """Return the output of a program that has the platform's servers and knows no task."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=platform.environment,
        cwd=platform.folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# -- declared


@pytest.mark.parametrize(
    ("task", "request_"),
    [
        ("nothing", {"cpus": 1, "slots": 1}),
        ("four", {"cpus": 4, "slots": 1}),
        ("four_and_two", {"cpus": 4, "memory": 2 * 2**30, "slots": 1}),
        ("an_eighth", {"cpus": 0.125, "memory": 1_000_000, "slots": 1}),
        ("none_at_all", {"cpus": 0, "slots": 1}),
        ("counted", {"cpus": 1, "gpus": 1, "licence": 2, "slots": 1}),
    ],
)
def test_a_task_declares_its_request(submitter: Submitter, task: str, request_: dict[str, Any]) -> None:
    declared = submitter.send(f"{DECLARED}.{task}")
    by_name = submitter.app.send_task(f"{DECLARED}.{task}").id
    for job in (declared, by_name):
        row = submitter.ended(job)
        assert (row.state, row.request, row.declared) == ("succeeded", request_, True)


@pytest.mark.parametrize(
    ("options", "request_"),
    [
        ({"cpus": 8, "memory": "512MiB"}, {"cpus": 8, "memory": 512 * 2**20, "slots": 1}),
        ({"cpus": 0.5}, {"cpus": 0.5, "memory": 2 * 2**30, "slots": 1}),
        ({"cpus": 0.001}, {"cpus": 0.001, "memory": 2 * 2**30, "slots": 1}),
        ({"cpus": 0, "memory": 0}, {"cpus": 0, "slots": 1}),
        ({"cpus": None}, {"cpus": 4, "memory": 2 * 2**30, "slots": 1}),
        ({"memory": "1.5G"}, {"cpus": 4, "memory": 1_500_000_000, "slots": 1}),
        ({"resources": {"licence": 1}}, {"cpus": 4, "memory": 2 * 2**30, "licence": 1, "slots": 1}),
    ],
)
def test_a_call_says_it_over_the_declaration(
    submitter: Submitter, options: dict[str, Any], request_: dict[str, Any]
) -> None:
    job = submitter.send(f"{DECLARED}.four_and_two", **options)
    row = submitter.ended(job)
    assert (row.state, row.request) == ("succeeded", request_)


def test_an_app_of_its_own_declares_as_well(platform: Platform, submitter: Submitter) -> None:
    environment = {**platform.environment, "NODE_NAME": "own", "PLATFORM_IMPORTS": "", "PLATFORM_RESOURCES": "own=1"}
    arguments = ["-A", "tests.tasks.own", "worker", "--pool", "threads", "--concurrency", "2", "--loglevel", "INFO"]
    command = [sys.executable, "-m", "celery", *arguments]
    worker = Process("own", command, {**environment, "PLATFORM_CPUS": "4"}, platform.folder)
    platform.processes.append(worker)
    worker.wait_for(READY)
    job = python(platform, "from tests.tasks.own import heavy; print(heavy.delay(21).id)")
    assert submitter.value(job) == 42
    row = submitter.ended(job)
    assert (row.worker, row.name) == ("own", "tests.tasks.own.heavy")
    assert row.request == {"cpus": 4, "memory": 2 * 2**30, "own": 1, "slots": 1}
    # A sender that knows only the name gets the request too: the worker published its tasks' declarations.
    by_name = submitter.app.send_task("tests.tasks.own.who").id
    assert submitter.value(by_name) == "own"
    assert submitter.row(by_name).request == {"cpus": 1, "own": 1, "slots": 1}
    assert worker.stop() == 0


# -- named resources


def test_a_named_resource_bounds_how_many_run(platform: Platform, submitter: Submitter) -> None:
    jobs = [submitter.send(HOLD, "licences", cpus=0, resources={"licence": 1}) for _ in range(3)]
    held = {tasks.started(platform.redis, "licences")[0] for _ in range(2)}
    assert held == set(jobs[:2])
    explanation = why(platform, jobs[2])
    assert (explanation.why, explanation.resource, explanation.asked, explanation.free, explanation.worker) == (
        Reason.NO_ROOM,
        "licence",
        1,
        0,
        "a",
    )
    tasks.let_go(platform.redis, "licences")
    assert tasks.started(platform.redis, "licences")[0] == jobs[2]
    tasks.let_go(platform.redis, "licences", 2)
    assert {submitter.ended(job).state for job in jobs} == {"succeeded"}


def test_more_of_a_resource_than_any_worker_has_waits_and_says_so(platform: Platform, submitter: Submitter) -> None:
    job = submitter.send(f"{DECLARED}.nothing", resources={"licence": 3})
    explanation = why(platform, job)
    assert (explanation.why, explanation.resource, explanation.asked) == (Reason.TOO_LARGE, "licence", 3)
    submitter.result(job).revoke()
    assert submitter.ended(job).state == "cancelled"


def test_a_resource_that_nobody_publishes_waits_until_somebody_does(platform: Platform, submitter: Submitter) -> None:
    job = submitter.send(f"{DECLARED}.nothing", resources={"tape": 1})
    explanation = why(platform, job)
    assert (explanation.why, explanation.resource, explanation.asked) == (Reason.UNKNOWN_RESOURCE, "tape", 1)
    library = platform.worker("library", cpus=1, pool="threads", PLATFORM_RESOURCES="tape=1")
    row = submitter.ended(job)
    assert (row.state, row.worker) == ("succeeded", "library")
    assert library.stop() == 0


# -- by name


def test_a_program_without_the_task_sends_it_with_its_declared_request(
    platform: Platform, submitter: Submitter
) -> None:
    job = python(
        platform,
        "from celery_capacity import create_app\n"
        f"print(create_app().send_task({DECLARED + '.four_and_two'!r}, memory='1GiB').id)",
    )
    row = submitter.ended(job)
    assert (row.state, row.declared) == ("succeeded", True)
    assert row.request == {"cpus": 4, "memory": 2**30, "slots": 1}


def test_task_known_to_its_sender_has_its_request_before_any_worker(settings: Settings) -> None:
    app = create_app("early", resolve=lambda _: settings)
    job = app.send_task(f"{DECLARED}.four_and_two").id
    with platform_of(app).engine.connect() as connection:
        row = connection.execute(text("SELECT request, declared FROM jobs WHERE id = :id"), {"id": job}).one()
    assert (row.request, row.declared) == ({"cpus": 4, "memory": 2 * 2**30, "slots": 1}, True)
    app.close()
    platform_of(app).engine.dispose()


def test_an_unknown_name_gets_the_default_and_the_job_says_so(submitter: Submitter) -> None:
    job = submitter.app.send_task("nobody.knows.this").id
    row = submitter.until(job, "waiting")
    assert (row.request, row.declared) == ({"cpus": 1, "slots": 1}, False)


def test_an_unknown_name_with_a_request_of_its_own_is_declared(submitter: Submitter) -> None:
    job = submitter.app.send_task("nobody.knows.this", cpus=2).id
    row = submitter.until(job, "waiting")
    assert (row.request, row.declared) == ({"cpus": 2, "slots": 1}, True)


# -- as long as the job lives


def test_the_request_is_in_the_message_and_survives_a_retry(submitter: Submitter) -> None:
    job = submitter.send(f"{DECLARED}.three_again", memory="1GiB")
    carried = message.decode(bytes(submitter.row(job).message))["headers"][HEADER]
    assert carried == {"shape": f"cpus=3000,memory={2**30},slots=1", "declared": True, "format": 1}
    row = submitter.ended(job)
    assert (row.state, row.retries, row.request) == ("succeeded", 1, {"cpus": 3, "memory": 2**30, "slots": 1})
    assert message.decode(bytes(row.message))["headers"][HEADER] == carried


def test_a_callback_has_a_request_of_its_own(submitter: Submitter) -> None:
    callback = submitter.app.tasks[f"{DECLARED}.an_eighth"].si()
    callback.set(task_id="a-callback")
    job = submitter.send(f"{DECLARED}.four", link=callback)
    assert submitter.ended(job).request == {"cpus": 4, "slots": 1}
    until(lambda: submitter.row(callback.id), "the callback is sent")
    row = submitter.ended(callback.id)
    assert row.request == {"cpus": 0.125, "memory": 1_000_000, "slots": 1}
    assert (row.parent_id, row.root_id) == (job, job)
