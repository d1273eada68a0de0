"""Jobs that `wait`, `cancel` and `retry` act on: by the beginning of an id, and by the filters of `jobs`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import click
import pytest
from celery import chain

from celery_capacity.platform.actions import cancel, retry
from celery_capacity.routing.config.embedded import Pair
from celery_capacity.workers.process.exit_codes import Exit
from tests.fixtures.jobs.submitting import Submitter, standing_platform
from tests.fixtures.processes.commanding import Run, in_process
from tests.fixtures.processes.platforms import Platform

ADD, FAIL = (f"tests.fixtures.tasks.{name}" for name in ("add", "fail"))


@pytest.fixture(scope="module")
def platform(server_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    with standing_platform(server_pair, tmp_path_factory.mktemp("choosing")) as running:
        running.worker("a", cpus=2)
        yield running


@pytest.fixture
def run(platform: Platform) -> Run:
    return in_process(platform.environment)


def ids(run: Run, *words: str) -> list[str]:
    """Return the ids that a command printed as JSON, after it ended well."""
    result = run(*words, "--json")
    assert result.exit_code == Exit.OK, result.output
    return sorted(job["id"] for job in json.loads(result.stdout))


def put_off(submitter: Submitter, **options: Any) -> str:
    return submitter.send(ADD, 1, 2, countdown=3600, **options)


# -- ids


def test_actions_take_the_beginning_of_an_id(run: Run, submitter: Submitter) -> None:
    job, failed = put_off(submitter, task_id="8b833605-a"), submitter.send(FAIL, "no", task_id="77f0c1aa-b")
    submitter.ended(failed)
    assert ids(run, "cancel", "8b833605", job) == [job]
    assert run("wait", "8b83", "--json").exit_code == Exit.CANCELLED
    assert ids(run, "retry", "77f0") == [failed]


def test_ambiguous_beginning_of_an_id_is_refused_with_the_ids(run: Run, submitter: Submitter) -> None:
    jobs = [put_off(submitter, task_id=f"51ed0000-{number}") for number in range(2)]
    result = run("cancel", "51ed", "--json")
    error = json.loads(result.stdout)
    assert (result.exit_code, error["reference"], error["value"]) == (Exit.FAILED, "unknown-job", "'51ed'")
    assert f"more than one job id begins with 51ed. Type more of the id. Some of them: {jobs[0]}" in error["detail"]
    assert {submitter.row(job).state for job in jobs} == {"scheduled"}
    assert ids(run, "cancel", "51ed0000-0", "51ed0000-1") == jobs


@pytest.mark.parametrize("command", [cancel.command, retry.command])
def test_ids_of_actions_are_completed(
    command: click.Command, platform: Platform, submitter: Submitter, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = put_off(submitter)
    for name, value in platform.environment.items():
        monkeypatch.setenv(name, value)
    argument = next(parameter for parameter in command.params if isinstance(parameter, click.Argument))
    completed = argument.shell_complete(click.Context(command), job[:8])
    assert [item.value for item in completed] == [job]
    submitter.app.control.revoke(job)


# -- filters


def test_cancel_takes_the_jobs_that_jobs_lists_for_a_pattern(run: Run, submitter: Submitter) -> None:
    job = put_off(submitter)
    filters = ("--task", "tests.*.add", "--state", "scheduled")
    assert job in (listed := ids(run, "jobs", *filters))
    assert ids(run, "cancel", *filters, "--yes") == listed


def test_cancel_takes_the_jobs_that_jobs_lists_for_a_workflow(run: Run, submitter: Submitter) -> None:
    signatures = [submitter.app.signature(ADD, (1, 2), immutable=True) for _ in range(2)]
    signatures[1].set(countdown=3600)
    last = chain(*signatures, app=submitter.app).apply_async()
    root = str(last.parent.id)
    submitter.until(str(last.id), "scheduled")
    assert ids(run, "jobs", "--group", root) == sorted([root, str(last.id)])
    assert ids(run, "cancel", "--group", root, "--yes") == [str(last.id)]


def test_retry_takes_the_failed_jobs_of_a_pattern(run: Run, submitter: Submitter) -> None:
    failed = submitter.send(FAIL, "pattern")
    submitter.ended(failed)
    assert failed in ids(run, "retry", "--failed", "--task", "tests.*.f*l", "--yes")
    assert run("retry", "--failed", "--task", "tests.*.f_il", "--yes").stdout == "no jobs\n"


@pytest.mark.parametrize(
    "words",
    [
        ("cancel", "--task", "nobody.*"),
        ("cancel", "--group", "nobody"),
        ("retry", "--failed", "--task", "nobody.*"),
    ],
)
def test_actions_fail_where_a_typed_filter_finds_no_jobs(run: Run, words: tuple[str, ...]) -> None:
    result = run(*words, "--yes")
    assert (result.exit_code, result.stdout) == (Exit.FAILED, "no jobs\n")
    assert run("cancel", "--state", "scheduled", "--yes").exit_code == Exit.OK
    assert run("cancel", "--state", "scheduled", "--yes").exit_code == Exit.OK
