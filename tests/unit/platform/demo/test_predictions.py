"""Forecasts of a replay stand beside the starts of the jobs that waited."""

from __future__ import annotations

from celery_capacity.platform.demo.predictions import MOMENTS, compare, due
from celery_capacity.routing.forecast.whatif import Today
from celery_capacity.routing.model.expected import RunTime
from celery_capacity.routing.model.request import Request
from celery_capacity.routing.model.states import Store
from celery_capacity.routing.policy.placement import Book, Waiting, order
from celery_capacity.routing.policy.reservation import Held, Rules
from celery_capacity.routing.simulation.forecast import Cluster, running_until
from celery_capacity.routing.simulation.jobs import Queued

NOW = 1_000_000
ONE = Request.of({"cpus": 1000})


def today(jobs: dict[str, int]) -> Today:
    """Return a copy with a worker of one CPU that is busy for 2 s, and jobs with their run times in milliseconds."""
    book = Book("w", {"cpus": 1000, "slots": 1}, {}).holding(ONE)
    queued = [
        Queued(Waiting(job, ONE, order(0, number), run_time=RunTime(run, run)), run)
        for number, (job, run) in enumerate(jobs.items())
    ]
    running = [running_until("busy", "w", Held(ONE, NOW, 2000), 2000, NOW)]
    return Today(Cluster(NOW, {"w": book}, running, queued, guessed=1), Rules(0), 0, Store.LEDGER, tasks_known=True)


def test_prediction_stands_beside_the_real_starts() -> None:
    starts = {"a": NOW / 1000 + 2.5, "b": NOW / 1000 + 6.5, "later": NOW / 1000 + 9}
    (prediction,) = compare([today({"a": 3000, "b": 1000})], starts, NOW / 1000 - 4)
    assert (prediction.at, prediction.jobs) == (4.0, 2)
    assert prediction.to_json() == {
        "at_seconds": 4.0,
        "waiting": 2,
        "guessed": 1,
        "empty_seconds": {"predicted": 5.0, "real": 6.5},
        "wait_mean_seconds": {"predicted": 3.5, "real": 4.5},
    }


def test_prediction_leaves_jobs_of_others_out() -> None:
    (prediction,) = compare([today({"other": 3000, "a": 1000})], {"a": NOW / 1000 + 5.25}, NOW / 1000)
    assert prediction.predicted.times == (5000,)
    assert prediction.real.times == (5250,)
    assert compare([today({"other": 3000})], {"a": NOW / 1000}, NOW / 1000) == ()


def test_mean_waits_are_those_of_jobs_whose_start_is_forecast() -> None:
    # Nobody knows how long the first job runs, so no start is forecast behind it.
    (prediction,) = compare([today({"a": 0, "b": 1000})], {"a": NOW / 1000 + 3, "b": NOW / 1000 + 4}, NOW / 1000)
    made = prediction.to_json()
    assert made["empty_seconds"] == {"predicted": None, "real": 4.0}
    assert made["wait_mean_seconds"] == {"predicted": 2.0, "real": 3.0}


def test_copies_are_taken_after_equal_parts_of_the_submissions() -> None:
    assert [number for number in range(1, 301) if due(number, 300)] == list(range(30, 301, 30))
    assert [number for number in range(1, 4) if due(number, 3)] == [1, 2, 3]
    assert sum(due(number, 25) for number in range(1, 26)) == MOMENTS
