"""Wait and run times of a worker: what counts, in which series, and how many series there can be."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from celery_capacity.routing.model.message import ETA, HEADER
from celery_capacity.routing.model.request import Request
from celery_capacity.routing.model.states import Outcome
from celery_capacity.routing.model.token import Token
from celery_capacity.workers.process.holdings import Holding
from celery_capacity.workers.supervision import job_times
from celery_capacity.workers.supervision.job_times import JobTimes
from celery_capacity.workers.supervision.metric_names import BUCKETS, MAX_LABEL, MAX_TASKS_OF_WORKER, OTHER

TOKEN = Token(1, 1)
#: A job that was submitted at a minute past the epoch, and admitted four seconds later.
HOLDING = Holding("job", TOKEN, Request.of({"cpus": 1000}), "", admitted_ms=64_000, submitted_ms=60_000)


class Counted:
    """Times of a worker `a`, and a clock that the test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.times = JobTimes(lambda job, token: HOLDING._replace(job=job, token=token))
        monkeypatch.setattr(job_times, "time", SimpleNamespace(monotonic=lambda: self.now))

    def run(self, job: str, seconds: float, outcome: Outcome = Outcome.SUCCEEDED, task: str = "tasks.render") -> None:
        self.times.began(f"{job}:{TOKEN}", (task, job, {}))
        self.now += seconds
        self.times.over(job, TOKEN, outcome)

    def samples(self, ends: str) -> dict[tuple[str, ...], float]:
        """Return the series of a name with this end, by the values of their labels."""
        samples: list[Any] = [sample for family in self.times.families("a") for sample in family.samples]
        return {tuple(sample.labels.values()): sample.value for sample in samples if sample.name.endswith(ends)}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


def test_run_time_counts_from_the_pool_to_the_end(counted: Counted) -> None:
    counted.run("first", 3.0)
    counted.run("second", 40.0, Outcome.FAILED)
    assert counted.samples("run_seconds_sum") == {("tasks.render", "a"): 43.0}
    buckets = counted.samples("run_seconds_bucket")
    assert [buckets["tasks.render", "a", bound] for bound in ("1.0", "5.0", "120.0", "+Inf")] == [0, 1, 2, 2]


def test_time_equal_to_a_bound_is_in_its_bucket(counted: Counted) -> None:
    counted.run("job", BUCKETS[4])
    assert counted.samples("run_seconds_bucket")["tasks.render", "a", str(BUCKETS[4])] == 1


@pytest.mark.parametrize("outcome", Outcome)
def test_only_bodies_that_came_to_an_end_have_a_run_time(counted: Counted, outcome: Outcome) -> None:
    counted.run("job", 1.0, outcome)
    ran = outcome in {Outcome.SUCCEEDED, Outcome.FAILED, Outcome.RETRIED, Outcome.REPLACED}
    assert counted.samples("run_seconds_count") == ({("tasks.render", "a"): 1} if ran else {})


def test_attempt_that_never_began_has_no_run_time(counted: Counted) -> None:
    counted.times.over("job", TOKEN, Outcome.FAILED)
    assert counted.samples("run_seconds_count") == {}


def test_tasks_beyond_the_bound_share_a_series(counted: Counted) -> None:
    for number in range(MAX_TASKS_OF_WORKER + 3):
        counted.run(f"job-{number}", 1.0, task=f"tasks.{number}")
    counts = counted.samples("run_seconds_count")
    assert len(counts) == MAX_TASKS_OF_WORKER + 1
    assert counts[OTHER, "a"] == 3


def test_long_name_of_a_task_is_cut(counted: Counted) -> None:
    counted.run("job", 1.0, task="t" * 1000)
    ((task, _),) = counted.samples("run_seconds_count")
    assert len(task) == MAX_LABEL


def test_wait_is_from_the_submission_to_the_admission(counted: Counted) -> None:
    counted.run("job", 1.0)
    assert counted.samples("wait_seconds_sum") == {("a",): 4.0}
    assert counted.samples("wait_seconds_count") == {("a",): 1}


def due(at: object, **headers: object) -> dict[str, Any]:
    return {HEADER: {ETA: at}, **headers}


@pytest.mark.parametrize(
    ("holding", "headers", "seconds"),
    [
        (HOLDING, {}, 4.0),
        (HOLDING, {"retries": 0, "replaced_task_nesting": 0, HEADER: {"shape": "cpus=1000"}}, 4.0),
        # A job that was put off waits from its time on, a retry from that of its countdown.
        (HOLDING, due("1970-01-01T00:01:03+00:00"), 1.0),
        (HOLDING, due("1970-01-01T00:01:03+00:00", retries=2), 1.0),
        (HOLDING, due("1970-01-01T00:00:07+00:00"), 4.0),
        # The clocks of the submitter and of the store differ.
        (HOLDING, due("1970-01-01T00:02:00+00:00"), 0.0),
        (HOLDING._replace(submitted_ms=65_000), {}, 0.0),
        # The worker cannot know these.
        (HOLDING, {"retries": 1}, None),
        (HOLDING, {"replaced_task_nesting": 1}, None),
        (HOLDING, due("soon"), None),
        (HOLDING._replace(submitted_ms=0), {}, None),
        (HOLDING._replace(admitted_ms=0), {}, None),
        (HOLDING, {HEADER: "forged"}, 4.0),
    ],
)
def test_wait_of_a_job_is_known(holding: Holding, headers: dict[str, Any], seconds: float | None) -> None:
    assert job_times.waited(holding, headers) == seconds


def test_unknown_wait_is_not_counted(counted: Counted) -> None:
    counted.times = JobTimes(lambda job, token: None)
    counted.run("job", 1.0)
    assert counted.samples("wait_seconds_count") == {("a",): 0}
    assert counted.samples("run_seconds_count") == {("tasks.render", "a"): 1}


def test_times_of_a_worker_are_found_until_it_ends() -> None:
    times = JobTimes(lambda job, token: None)
    job_times.begin("life", times)
    try:
        assert job_times.of("life") is times
        assert job_times.of("other") is None
    finally:
        job_times.end("life")
    assert job_times.of("life") is None
