"""The API over running stores: each path answers by its model, and wrong input is refused with what to do."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest
import redis
from sqlalchemy import text

from celery_capacity.platform.documents import cluster
from celery_capacity.platform.documents import job as job_documents
from celery_capacity.platform.documents.parts import Closed
from celery_capacity.platform.web import task_statistics
from celery_capacity.platform.web.api import models
from celery_capacity.platform.web.api.workflow_models import Workflow
from celery_capacity.platform.web.application import Application
from celery_capacity.platform.web.http.security import Rates
from celery_capacity.platform.web.sources import Sources
from celery_capacity.routing.database import job_lines
from celery_capacity.routing.database.job_lines import JobLine
from celery_capacity.routing.model.request import Request, alternatives_term
from celery_capacity.workers.process.stores import Stores
from tests.fixtures.servers.web import client_of, serving
from tests.fixtures.stores.books import FOR_EVER
from tests.fixtures.stores.staged import Stage


def application(
    stage: Stage, token: str | None = None, rates: Rates | None = None, *, reachable: bool = True
) -> Application:
    """Return a dashboard on the stores of a stage. `reachable`: False where it does not reach Redis."""
    stores = Stores(lambda _: stage.settings)
    stores._made.update(settings=stage.settings, engine=stage.engine, ledger=stage.ledger)
    sources = Sources(stores, lambda: None)
    if not reachable:
        sources.client = redis.Redis(port=1, socket_connect_timeout=1)
    return Application(sources, token=token, rates=rates)


@pytest.fixture
def client(stage: Stage) -> Iterator[httpx.Client]:
    with serving(application(stage)) as url, client_of(url) as asking:
        yield asking


PATHS: dict[str, type[Closed]] = {
    "/api/v1/dashboard": cluster.Dashboard,
    "/api/v1/workers": models.Workers,
    "/api/v1/backlog": cluster.Backlog,
    "/api/v1/jobs": models.Jobs,
    "/api/v1/jobs/job-1": job_documents.JobDetail,
    "/api/v1/jobs/job-1/logs": models.LogLines,
    "/api/v1/jobs/job-1/workflow": Workflow,
    "/api/v1/tasks": job_documents.Tasks,
    "/api/v1/runs": models.Runs,
    "/api/v1/last-hour": models.LastHour,
    "/api/v1/runs/hole?worker=a&at=1min": models.Hole,
    "/health": models.Health,
    "/healthz": models.Health,
    "/readyz": models.Health,
}


@pytest.mark.parametrize("path", PATHS)
def test_path_answers_by_its_model(path: str, stage: Stage, client: httpx.Client) -> None:
    stage.worker("a", cpus=4000)
    for cpus in (1000, 4000, 9000):
        stage.submit(cpus=cpus)
    answer = client.get(path)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
    PATHS[path].model_validate(answer.json())
    assert client.head(path).status_code == 200


def test_backlog_tells_reason_and_what_never_runs_first(stage: Stage, client: httpx.Client) -> None:
    stage.worker("a", cpus=4000)
    for cpus in (3000, 2000, 9000):
        stage.submit(cpus=cpus)
    groups = client.get("/api/v1/backlog").json()["groups"]
    assert [(group["why"], group["blocked"]) for group in groups] == [("too-large", True), ("no-room", False)]


def test_waiting_job_shows_its_alternatives(stage: Stage, client: httpx.Client) -> None:
    stage.worker("a", cpus=1000, gpus=1)
    first, wide = Request.of({"cpus": 1000, "gpus": 1}), Request.of({"cpus": 9000})
    term = alternatives_term([first, wide])
    running, waiting = (stage.submit(cpus=1000, gpus=1, place=term) for _ in range(2))
    shown = [first.to_people(), wide.to_people()]
    answers = [client.get(f"/api/v1/jobs/{job}").json() for job in (running, waiting)]
    assert [answer["alternatives"] for answer in answers] == [[], shown]
    for answer in answers:
        job_documents.JobDetail.model_validate(answer)
    backlog = client.get("/api/v1/backlog").json()
    cluster.Backlog.model_validate(backlog)
    assert [group["alternatives"] for group in backlog["groups"]] == [shown]
    assert [line["alternatives"] for line in backlog["backlog"]] == [shown]
    for page in (f"/jobs/{waiting}", "/waiting"):
        assert "<dd>1 CPU, 1 gpu or 9 CPUs" in client.get(page).text
    assert "<dd>1 CPU, 1 gpu</dd>" in client.get(f"/jobs/{running}").text


def test_jobs_come_in_pages_without_gap_or_double(stage: Stage, client: httpx.Client) -> None:
    stage.worker("a", cpus=2000)
    ids = [stage.submit(cpus=1000) for _ in range(7)]
    seen: list[str] = []
    page: dict[str, Any] = {"next_cursor": None}
    for _ in range(9):
        asked = {"limit": 2, **({"cursor": page["next_cursor"]} if page["next_cursor"] else {})}
        page = client.get("/api/v1/jobs", params=asked).json()
        seen += [job["id"] for job in page["jobs"]]
        if page["next_cursor"] is None:
            break
    assert seen == ids[::-1]


@pytest.mark.parametrize(
    ("query", "number"),
    [
        ("state=waiting", 2),
        ("state=waiting&state=running&state=admitted", 3),
        ("task=ta*", 3),
        ("task=other", 0),
        ("queue=celery", 3),
        ("text=JOB-2", 1),
        ("text=100%25", 0),
        ("since=1h", 3),
        ("until=1h", 0),
    ],
)
def test_filter_selects_jobs(query: str, number: int, stage: Stage, client: httpx.Client) -> None:
    stage.worker("a", cpus=1000)
    for _ in range(3):
        stage.submit(cpus=1000)
    assert len(client.get(f"/api/v1/jobs?{query}").json()["jobs"]) == number


@pytest.mark.parametrize(
    "path",
    ["jobs?state=none", "jobs?limit=0", "jobs?limit=99999", "jobs?cursor=x", "jobs?since=x", "jobs?text=%00",
     "events?only=x"],
)  # fmt: skip
def test_wrong_parameter_is_refused_with_advice(path: str, client: httpx.Client) -> None:
    answer = client.get(f"/api/v1/{path}")
    assert (answer.status_code, answer.headers["content-type"]) == (400, "application/problem+json")
    assert answer.json()["reference"] == "invalid-request"
    assert answer.json()["advice"]


def test_unknown_job_is_not_found_and_names_nearest(stage: Stage, client: httpx.Client) -> None:
    stage.insert({"cpus": 1000})
    problem = client.get("/api/v1/jobs/job-7").json()
    assert (problem["status"], problem["reference"]) == (404, "unknown-job")
    assert "job-1" in problem["detail"]


def test_openapi_has_every_path(client: httpx.Client) -> None:
    document = client.get("/api/v1/openapi.json").json()
    assert set(document["paths"]) == {
        f"/api/v1/{path}"
        for path in (
            "dashboard", "workers", "backlog", "tasks", "jobs", "jobs/{job_id}", "jobs/{job_id}/logs", "runs",
            "jobs/{job_id}/workflow",
            "runs/hole", "events", "last-hour", "audit", "quarantine", "quarantine/drop", "quarantine/requeue",
            "cancel", "retry", "pause", "resume", "reconcile", "jobs/bulk",
            *(f"jobs/{{job_id}}/{action}" for action in ("cancel", "retry", "priority")),
            *(f"workers/{{name}}/{action}" for action in ("cordon", "uncordon", "drain", "shutdown")),
        )
    }  # fmt: skip


@pytest.mark.parametrize("path", ["dashboard", "jobs", "jobs/job-1/workflow", "tasks", "last-hour", "backlog"])
def test_value_that_a_client_has_is_not_sent_again(path: str, stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.insert({"cpus": 1000})
    app = application(stage)
    with serving(app) as url, client_of(url) as asking:
        # Ages and times differ from read to read; here each value is read once.
        monkeypatch.setattr("celery_capacity.platform.web.prepared.MAX_AGE", FOR_EVER)
        first = asking.get(f"/api/v1/{path}")
        tag = first.headers["etag"]
        for names in (tag, f'"other", W/{tag}', "*"):
            again = asking.get(f"/api/v1/{path}", headers={"If-None-Match": names})
            assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
        assert asking.get(f"/api/v1/{path}", headers={"If-None-Match": '"other"'}).json() == first.json()


def test_client_that_asks_too_often_is_told_to_wait(stage: Stage) -> None:
    app = application(stage, rates=Rates(burst=2, rate=0, clock=lambda: 0.0))
    with serving(app) as url, client_of(url) as asking:
        answers = [asking.get("/health") for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert answers[2].headers["retry-after"] == "1"


def test_figures_of_tasks_read_the_newest_jobs_by_an_index(stage: Stage) -> None:
    with stage.engine.begin() as connection:
        # The table is small here, so that Postgres would read it whole.
        connection.exec_driver_sql("SET LOCAL enable_seqscan = off")
        connection.exec_driver_sql("SET LOCAL enable_bitmapscan = off")
        values = {"states": ["succeeded", "waiting"], "sample": 10, "most": 10, "name": None}
        plan = "\n".join(connection.execute(text(f"EXPLAIN {task_statistics._FIGURES}"), values).scalars())
    assert "using jobs_state_seq on jobs" in plan, plan
    assert "Seq Scan on jobs" not in plan


def test_logs_of_a_job_come_from_a_cursor_on(stage: Stage, client: httpx.Client) -> None:
    stage.worker("a", cpus=4000)
    job, at = stage.submit(cpus=1000), datetime.now(UTC)
    lines = [JobLine(job, 1, 1, number, at, "INFO", "tasks", f"<b>line {number}") for number in (1, 2, 3)]
    with stage.engine.connect() as connection:
        job_lines.write(connection, lines, 100)
    path = f"/api/v1/jobs/{job}/logs"
    newest = client.get(path, params={"limit": 1}).json()
    assert [line["number"] for line in newest["lines"]] == [3]
    assert client.get(path, params={"after": newest["cursor"]}).json() == {"lines": [], "cursor": None}
    rest = client.get(path, params={"after": "1.1.1", "attempt": 1}).json()
    assert [line["message"] for line in rest["lines"]] == ["<b>line 2", "<b>line 3"]
    assert client.get(path, params={"after": "1.1"}).status_code == 400
    assert client.get("/api/v1/jobs/no-such-job/logs").status_code == 404
    assert "INFO &lt;b&gt;line 3" in client.get(f"/jobs/{job}").text
