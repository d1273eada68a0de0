"""A job's expected run time: declared with the task, passed with the call, and kept as long as the job lives."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, Final

import pytest

from celery_capacity.routing.config.embedded import Pair
from celery_capacity.routing.errors import InvalidRequest
from celery_capacity.routing.ledger import keys
from celery_capacity.routing.model import message
from celery_capacity.routing.model.expected import RunTime, expected_class
from celery_capacity.routing.model.message import HEADER
from celery_capacity.routing.model.request import timed
from tests.fixtures.jobs.submitting import Submitter, standing_platform
from tests.fixtures.processes.platforms import Platform
from tests.integration.submit.test_requests import python
from tests.tasks import declared

DECLARED: Final = declared.__name__
ONE: Final = "cpus=1000,slots=1"
#: Ten minutes, half an hour and an hour, in ms.
TEN, THIRTY, HOUR = 600_000, 1_800_000, 3_600_000


@pytest.fixture(scope="module")
def platform(server_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """Yield a platform with one worker."""
    with standing_platform(server_pair, tmp_path_factory.mktemp("expected"), DECLARED) as running:
        running.worker("a", cpus=4, pool="threads")
        yield running


def shape(expected: int, bound: int = 0, request: str = ONE) -> str:
    return timed(request, RunTime(expected, bound or expected))


def row_of(submitter: Submitter, job: str) -> tuple[str, int, str]:
    row = submitter.ended(job)
    return row.state, row.expected_ms, row.shape


@pytest.mark.parametrize(
    ("task", "expected", "bound"),
    [("ten_minutes", TEN, 0), ("half_an_hour", THIRTY, HOUR), ("an_hour_at_most", HOUR, 0)],
)
def test_task_declares_its_run_time(submitter: Submitter, task: str, expected: int, bound: int) -> None:
    name = f"{DECLARED}.{task}"
    for job in (submitter.send(name), submitter.app.send_task(name).id):
        assert row_of(submitter, job) == ("succeeded", expected, shape(expected, bound))


def test_worker_publishes_run_times_for_senders_by_name(platform: Platform, submitter: Submitter) -> None:
    stored: Any = platform.redis.hgetall(keys.DECLARED_TIMES)
    published = {name.decode(): json.loads(times) for name, times in stored.items()}
    assert published[f"{DECLARED}.half_an_hour"] == {"expected_ms": THIRTY, "limits_ms": [HOUR, 0]}
    assert f"{DECLARED}.four" not in published
    code = f"from celery_capacity import create_app; print(create_app().send_task({DECLARED + '.half_an_hour'!r}).id)"
    assert row_of(submitter, python(platform, code)) == ("succeeded", THIRTY, shape(THIRTY, HOUR))


@pytest.mark.parametrize(
    ("options", "expected", "bound"),
    [
        ({"expected": "30m"}, THIRTY, 0),
        ({"expected": 1800}, THIRTY, 0),
        ({"expected": timedelta(minutes=30)}, THIRTY, 0),
        ({"expected": None}, TEN, 0),
        ({"time_limit": 60}, 60_000, 0),
        ({"expected": "1s", "time_limit": 60}, 1000, 60_000),
        ({"expected": "30m", "soft_time_limit": 600}, TEN, 0),
    ],
)
def test_call_says_its_run_time_over_the_declaration(
    submitter: Submitter, options: dict[str, Any], expected: int, bound: int
) -> None:
    job = submitter.send(f"{DECLARED}.ten_minutes", **options)
    assert row_of(submitter, job) == ("succeeded", expected, shape(expected, bound))


def test_jobs_that_are_alike_have_their_run_times_by_a_template(submitter: Submitter) -> None:
    jobs = [submitter.send(f"{DECLARED}.nothing", expected=time) for time in ("10m", "10m", "10m", "10m", "30m", "30m")]
    assert [row_of(submitter, job)[1] for job in jobs] == [TEN] * 4 + [THIRTY] * 2
    many = submitter.app.submit_many(f"{DECLARED}.nothing", [()] * 5, expected="10m")
    assert {row_of(submitter, result.id) for result in many} == {("succeeded", TEN, shape(TEN))}


def test_wrong_run_time_is_refused_before_anything_is_written(submitter: Submitter) -> None:
    for value in ("soon", 0, -3, True, "20y"):
        with pytest.raises(InvalidRequest, match="expected="):
            submitter.app.send_task(f"{DECLARED}.nothing", expected=value, task_id="never")
    with pytest.raises(InvalidRequest, match=r"expect=.* is not an option"):
        submitter.app.send_task(f"{DECLARED}.nothing", expect="10m", task_id="never")
    assert submitter.row("never") is None


def test_run_time_is_in_the_message_and_survives_a_retry(submitter: Submitter) -> None:
    job = submitter.send(f"{DECLARED}.three_again", expected="10m")
    row = submitter.ended(job)
    assert (row.state, row.retries, row.expected_ms) == ("succeeded", 1, TEN)
    carried = message.decode(bytes(row.message))["headers"][HEADER]
    three = shape(TEN, request="cpus=3000,slots=1")
    assert carried == {"shape": three, "declared": True, "expected_ms": TEN, "format": 1}
    assert row.shape == three


def test_steps_of_a_canvas_have_run_times_of_their_own(submitter: Submitter) -> None:
    tasks = submitter.app.tasks
    first = tasks[f"{DECLARED}.nothing"].si().set(task_id="first-step", expected="1s")
    last = tasks[f"{DECLARED}.ten_minutes"].si().set(task_id="last-step")
    (first | last).apply_async()
    assert row_of(submitter, "last-step")[1] == TEN
    assert row_of(submitter, "first-step")[1] == 1000


def test_map_of_a_task_runs_longer_than_the_task(submitter: Submitter) -> None:
    mapped = submitter.app.tasks[f"{DECLARED}.echo"].map([1, 2])
    assert row_of(submitter, mapped.apply_async().id)[1] == 0
    assert row_of(submitter, mapped.set(expected="10m").apply_async().id)[1] == TEN


def test_commands_take_and_show_the_run_time(platform: Platform, submitter: Submitter) -> None:
    job = platform.celery("submit", f"{DECLARED}.nothing", "--expected", "10m").stdout.strip()
    assert submitter.ended(job).expected_ms == TEN
    assert "expected  10 min" in platform.celery("job", job).stdout
    assert json.loads(platform.celery("job", job, "--json").stdout)["expected_ms"] == TEN
    assert json.loads(platform.celery("jobs", "--json", "--limit", "1").stdout)[0]["expected_ms"] == TEN


def test_class_of_ten_minutes_is_the_documented_one() -> None:
    assert expected_class(TEN) == 688_862
