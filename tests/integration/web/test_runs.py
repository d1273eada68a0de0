"""Who ran where: the runs of a stretch of time, the holes between them, and what waited in a hole."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from sqlalchemy import text

from celery_capacity.platform.web import holes, runs
from celery_capacity.platform.web.pages import lines
from celery_capacity.routing.model.request import Request, alternatives_term
from tests.fixtures.stores.staged import Stage
from tests.integration.web.test_api import client

__all__ = ["client"]

WRITTEN = pytest.mark.leaves(
    "I1", "I2", "I4", "I6", because="rows are written that no worker and no ledger knows", sometimes=True
)


class History:
    """Rows of jobs that ran, written as Postgres keeps them; times are seconds before the test began."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self._now = datetime.now(UTC).replace(microsecond=0)

    def moment(self, seconds: float) -> str:
        """Return the time so many seconds before the test began."""
        return (self._now - timedelta(seconds=seconds)).isoformat()

    def worker(self, name: str, cpus: int = 4, began: float = 3600, left: float | None = None) -> None:
        self.stage.worker(name, cpus=1000 * cpus)
        self.stage.sql(
            "UPDATE workers SET started_at = :began, left_at = :left WHERE name = :name",
            name=name,
            began=self.moment(began),
            left=None if left is None else self.moment(left),
        )

    def ran(self, worker: str, submitted: float, admitted: float, ended: float | None, cpus: int = 4) -> str:
        job = self.stage.insert({"cpus": 1000 * cpus})
        state = "running" if ended is None else "succeeded"
        self.stage.sql(
            "UPDATE jobs SET state = :state, epoch = 1, attempt = 1, step = 9, worker = :worker, incarnation = 'x',"
            " submitted_at = :submitted, admitted_at = :admitted, started_at = :admitted, finished_at = :ended"
            " WHERE id = :job",
            job=job,
            state=state,
            worker=worker,
            submitted=self.moment(submitted),
            admitted=self.moment(admitted),
            ended=None if ended is None else self.moment(ended),
        )
        self.attempt(job, 1, worker, admitted, ended, None if ended is None else state)
        return job

    def attempt(
        self, job: str, number: int, worker: str, admitted: float, ended: float | None, outcome: str | None
    ) -> None:
        self.stage.sql(
            "INSERT INTO attempts (job_id, epoch, attempt, worker, incarnation, admitted_at, started_at, ended_at,"
            " outcome) VALUES (:job, 1, :number, :worker, 'x', :admitted, :admitted, :ended, :outcome)",
            job=job,
            number=number,
            worker=worker,
            admitted=self.moment(admitted),
            ended=None if ended is None else self.moment(ended),
            outcome=outcome,
        )

    def waits(self, submitted: float, cpus: int, alternatives: str = "") -> str:
        job = self.stage.insert({"cpus": 1000 * cpus}, place=alternatives)
        self.stage.sql("UPDATE jobs SET submitted_at = :at WHERE id = :job", job=job, at=self.moment(submitted))
        return job


@pytest.fixture
def history(stage: Stage) -> History:
    return History(stage)


def asked(client: httpx.Client, path: str, **query: Any) -> Any:
    answer = client.get(f"/api/v1/{path}", params=query)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.leaves(
    "I1", "I2", "I4", "I6", because="rows are written that no worker and no ledger knows", sometimes=True
)
def test_runs_are_those_of_the_stretch(history: History, client: httpx.Client) -> None:
    history.worker("a")
    history.ran("a", 1000, 900, 800)
    inside = history.ran("a", 500, 490, 300)
    later = history.ran("a", 390, 380, 100)
    now = history.ran("a", 350, 340, None)
    history.ran("a", 90, 80, 70)
    document = asked(client, "runs", since=history.moment(400), until=history.moment(200))
    assert [run["job"] for run in document["runs"]] == [now, later, inside]
    assert document["whole"]
    assert document["workers"] == [{"name": "a", "cpus": 4, "status": "ready"}]


@pytest.mark.leaves(
    "I1", "I2", "I4", "I6", because="rows are written that no worker and no ledger knows", sometimes=True
)
def test_runs_have_each_attempt_of_a_job_that_waits_again(history: History, client: httpx.Client) -> None:
    job = history.waits(300, cpus=4)
    history.stage.sql("UPDATE jobs SET state = 'waiting', attempt = 2, step = 11 WHERE id = :job", job=job)
    history.attempt(job, 1, "a", 200, 150, "lost")
    history.attempt(job, 2, "b", 100, 50, "retried")
    document = asked(client, "runs")
    assert [(run["worker"], run["outcome"]) for run in document["runs"]] == [("b", "retried"), ("a", "lost")]


@pytest.mark.leaves(
    "I1", "I2", "I4", "I6", because="rows are written that no worker and no ledger knows", sometimes=True
)
def test_runs_say_that_some_are_left_out(history: History, client: httpx.Client) -> None:
    jobs = [history.ran("a", 60 - number, 50 - number, 40 - number) for number in range(3)]
    document = asked(client, "runs", limit=2)
    assert [run["job"] for run in document["runs"]] == jobs[:0:-1]
    assert not document["whole"]


@pytest.mark.leaves(
    "I1", "I2", "I4", "I6", because="rows are written that no worker and no ledger knows", sometimes=True
)
def test_runs_look_past_a_bounded_number_of_jobs_that_never_ran(
    history: History, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = history.ran("a", 60, 50, 40)
    for _ in range(3):
        job = history.waits(30, cpus=4)
        history.stage.sql("UPDATE jobs SET state = 'cancelled', finished_at = now() WHERE id = :job", job=job)
    for examined, jobs, whole in ((5, [ran], True), (4, [ran], False), (3, [], False)):
        monkeypatch.setattr(runs, "EXAMINED", examined)
        document = asked(client, "runs", limit=2)
        assert ([run["job"] for run in document["runs"]], document["whole"]) == (jobs, whole)


@pytest.mark.leaves(
    "I1", "I2", "I4", "I6", because="rows are written that no worker and no ledger knows", sometimes=True
)
def test_hole_tells_what_waited_and_what_was_missing(history: History, client: httpx.Client) -> None:
    history.worker("a", cpus=4)
    history.ran("a", 300, 290, 100, cpus=3)
    wide = history.ran("a", 250, 90, 80, cpus=2)
    history.waits(240, cpus=9)
    history.ran("b", 230, 50, None, cpus=1)
    history.waits(10, cpus=1)
    history.waits(220, cpus=2, alternatives=alternatives_term([Request.of({"cpus": 1000 * n}) for n in (2, 1)]))
    hole = asked(client, "runs/hole", worker="a", at=history.moment(200))
    assert hole["free"]["cpus"] == 1
    waited = [(group["request"]["cpus"], group["why"], group["short"]) for group in hole["waited"]]
    assert waited == [(2, "no-room", {"cpus": 1}), (9, "too-large", {"cpus": 5}), (1, None, {}), (1, None, {})]
    assert (hole["waited"][0]["first"], hole["waited"][0]["waited_seconds"]) == (wide, 50)


@pytest.mark.leaves(
    "I1", "I2", "I4", "I6", because="rows are written that no worker and no ledger knows", sometimes=True
)
@pytest.mark.parametrize("at", [4000, 100])
def test_hole_outside_of_life_of_worker_has_no_room(at: float, history: History, client: httpx.Client) -> None:
    history.worker("a", left=200)
    history.waits(5000, cpus=1)
    hole = asked(client, "runs/hole", worker="a", at=history.moment(at))
    assert hole["free"] is None
    assert [group["why"] for group in hole["waited"]] == ["no-worker"]


@pytest.mark.parametrize(
    "path",
    ["runs?since=x", "runs?limit=10001", "runs?since=1h&until=2h", "runs/hole?worker=a", "runs/hole?worker=&at=1h",
     "runs/hole?worker=a&at=2999-01-01", "runs/hole?worker=%00&at=1h"],
)  # fmt: skip
def test_wrong_stretch_is_refused_with_advice(path: str, client: httpx.Client) -> None:
    answer = client.get(f"/api/v1/{path}")
    assert (answer.status_code, answer.json()["reference"]) == (400, "invalid-request")
    assert answer.json()["advice"]


def test_runs_and_holes_are_read_by_indexes(stage: Stage) -> None:
    now = datetime.now(UTC)
    values: dict[str, Any] = {"most": 10, "states": ["running"], "since": now, "until": now, "at": now, "groups": 5}
    values["attempts"], values["examined"] = 5, 20
    ways = ("enable_seqscan", "enable_bitmapscan", "enable_sort")
    with stage.engine.connect() as connection:
        # The tables are small here, so that Postgres would read them whole.
        for way in ways:
            connection.exec_driver_sql(f"SET {way} = off")
        plans = [
            "\n".join(connection.execute(text(f"EXPLAIN {statement}"), values).scalars())
            for statement in (runs._RUNS, holes._WAITED)
        ]
        for way in ways:
            connection.exec_driver_sql(f"RESET {way}")
    for plan, index in itertools.product(plans, ("jobs_finished", "jobs_state_seq", "attempts_pkey")):
        assert f"using {index} on" in plan, plan
        assert "Seq Scan on" not in plan, plan
    assert "using jobs_backlog on" in plans[1]


@WRITTEN
def test_tasks_tell_what_they_ask_for_and_their_trend(history: History, client: httpx.Client) -> None:
    for number in range(24):
        history.ran("a", 2400 - 100 * number, 2390 - 100 * number, 2389 - 101 * number, cpus=2 + number % 3)
    (task,) = client.get("/api/v1/tasks").json()["tasks"]
    assert (task["cpus_least"], task["cpus_most"], task["memory_least"], task["memory_most"]) == (2, 4, 0, 0)
    assert task["run_trend_seconds"] == [1.5 + 2 * part for part in range(12)]
    page = client.get("/tasks").text
    assert '<path class="line l0" d="M0 94L55 85' in page
    assert "+356 %" in page
    assert '<td class="number">2–4</td><td class="number">–</td>' in page


def test_trend_needs_some_runs_and_a_run_time() -> None:
    assert [lines.trend(values) for values in ([], [1.0, 2.0])] == [("", "")] * 2
    assert lines.trend([0.0, 0.0, 0.0]) == ("M0 100L300 100L600 100", "")
    assert lines.trend([4.0, 3.0, 1.0])[1] == "-75 %"
