"""Learned run times: a quantile by task and request, from the jobs that succeeded since the last pass."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import pytest
from sqlalchemy import Engine, text

from celery_capacity.routing.model.expected import RunTime, expected_class
from celery_capacity.routing.model.request import Request, timed
from celery_capacity.routing.policy.learned_times import FEWEST
from celery_capacity.routing.simulation.expectations import Learned
from celery_capacity.routing.simulation.jobs import Submission
from celery_capacity.routing.store import run_times

ONE: Final = Request.of({"cpus": 1000}).shape
SECOND, MINUTE = 1000, 60_000


def ended(engine: Engine, *times: int, task: str = "task", shape: str = ONE, state: str = "succeeded") -> None:
    """Insert jobs that ended some seconds ago, and that ran for so many milliseconds."""
    rows = [
        {"id": f"{task}-{state}-{shape}-{number}-{ms}", "name": task, "shape": shape, "state": state, "ms": ms}
        for number, ms in enumerate(times)
    ]
    with engine.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO jobs (id, name, state, shape, request, queue, message, started_at, finished_at) VALUES"
                " (:id, :name, :state, :shape, '{}', 'celery', '', now() - interval '10 s' - :ms * interval '1 ms',"
                " now() - interval '10 s')"
            ),
            rows,
        )


def learn(engine: Engine) -> int:
    with engine.begin() as connection:
        return run_times.learn(connection).jobs


def learned(engine: Engine) -> dict[Any, int]:
    with engine.connect() as connection:
        return dict(run_times.learned(connection))


def row(engine: Engine, task: str = "task") -> Any:
    with engine.connect() as connection:
        return connection.execute(text("SELECT * FROM run_times WHERE task = :task"), {"task": task}).one()


def forget_pass(engine: Engine) -> None:
    """Have the next pass read all jobs again, as if they had ended since."""
    with engine.begin() as connection:
        connection.execute(text("DELETE FROM jobs"))
        connection.execute(text("UPDATE run_times_read SET read_until = now() - interval '1 minute'"))


def test_pass_learns_from_jobs_that_succeeded_since_the_last_one(engine: Engine) -> None:
    slow = timed(ONE, RunTime(60 * MINUTE, 60 * MINUTE))
    ended(engine, *[SECOND] * 3)
    ended(engine, *[SECOND] * 3, shape=slow)
    ended(engine, *[MINUTE] * 9, state="failed")
    ended(engine, *[MINUTE] * 9, task="celery.map")
    assert learn(engine) == 6
    assert learn(engine) == 0, "they were read"
    # The class that a job was filed under makes no kind of its own.
    assert learned(engine) == {("task", ONE): expected_class(SECOND)}
    stored = row(engine)
    assert (stored.count, stored.spread_ms, stored.request) == (6, 0, ONE)


def test_pass_goes_on_with_the_histogram_of_the_passes_before(engine: Engine) -> None:
    other = Request.of({"cpus": 2000}).shape
    ended(engine, *[SECOND] * (FEWEST - 1))
    ended(engine, *[MINUTE] * FEWEST, shape=other)
    learn(engine)
    assert learned(engine) == {("task", other): expected_class(MINUTE)}
    forget_pass(engine)
    ended(engine, SECOND)
    assert learn(engine) == 1
    assert learned(engine) == {("task", ONE): expected_class(SECOND), ("task", other): expected_class(MINUTE)}


def test_call_reads_a_bounded_number_of_jobs_and_the_next_goes_on(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_times, "MAX_READ", 2)
    with engine.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO jobs (id, name, state, shape, request, queue, message, started_at, finished_at) SELECT"
                " n::text, 'task', 'succeeded', :shape, '{}', 'celery', '', now() - interval '20 s',"
                " now() - interval '20 s' + n * interval '1 s' FROM generate_series(1, 5) AS n"
            ),
            {"shape": ONE},
        )
    with engine.begin() as connection:
        calls = [run_times.learn(connection) for _ in range(4)]
    assert calls == [(2, True), (2, True), (1, False), (0, False)]


def test_pairs_that_are_kept_are_bounded(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_times, "MAX_KEPT", 2)
    for task in ("a", "b", "c"):
        ended(engine, *[SECOND] * FEWEST, task=task)
        learn(engine)
        forget_pass(engine)
    assert {task for task, _ in learned(engine)} == {"b", "c"}


def test_simulation_learns_the_times_that_postgres_learns(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_times, "MAX_READ", 1)
    chance, simulated = random.Random(16), Learned()
    jobs = [
        Submission(str(number), 0, round(chance.lognormvariate(8, 2)), Request.of({"cpus": cpus}), task)
        for number in range(80)
        for task, cpus in [chance.choice([("a", 1000), ("a", 2000), ("b", 1000)])]
    ]
    with engine.begin() as connection:
        for number, job in enumerate(jobs):
            connection.execute(
                text(
                    "INSERT INTO jobs (id, name, state, shape, request, queue, message, started_at, finished_at) VALUES"
                    " (:id, :name, 'succeeded', :shape, '{}', 'celery', '', :ended - :ms * interval '1 ms', :ended)"
                ),
                {
                    "id": job.job,
                    "name": job.task,
                    "shape": job.request.shape,
                    "ms": job.run,
                    "ended": datetime.now(UTC) - timedelta(seconds=len(jobs) - number + 10),
                },
            )
    for job in jobs:
        with engine.begin() as connection:
            assert run_times.learn(connection).jobs == 1
            in_postgres = dict(run_times.learned(connection))
        simulated.learn(job)
        assert in_postgres == {
            (it.task, it.request.shape): simulated.expected(it) for it in jobs if simulated.expected(it)
        }, job
    assert len(in_postgres) == 3
