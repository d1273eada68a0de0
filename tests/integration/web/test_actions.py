"""Actions by HTTP on a running platform: each does what its command does, is in the audit, and needs a token."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from celery_capacity.platform.web.api import action_models as models
from celery_capacity.platform.web.application import Application
from celery_capacity.platform.web.http.login import Access
from celery_capacity.platform.web.http.security import MAX_BODY
from celery_capacity.platform.web.sources import Sources
from celery_capacity.routing.config.embedded import Pair
from celery_capacity.routing.model.message import decode
from celery_capacity.workers.client.controls import operator
from tests.fixtures import tasks
from tests.fixtures.jobs.submitting import Submitter, standing_platform
from tests.fixtures.processes.platforms import Platform
from tests.fixtures.servers.web import UNBOUNDED, client_of, serving

OPERATOR, VIEWER = "0123456789abcdef", "fedcba9876543210"
ADD, FAIL, HOLD = (f"tests.fixtures.tasks.{name}" for name in ("add", "fail", "hold"))
BEARER = {"Authorization": f"Bearer {OPERATOR}"}


@pytest.fixture(scope="module")
def platform(server_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    with standing_platform(server_pair, tmp_path_factory.mktemp("actions")) as running:
        running.worker("a", cpus=2, pool="threads", slots=4)
        yield running


@pytest.fixture
def client(submitter: Submitter) -> Iterator[httpx.Client]:
    sources = Sources(submitter.app.platform, lambda: submitter.app)
    access = Access(VIEWER, user_header="x-forwarded-user")
    app = Application(sources, token=OPERATOR, rates=UNBOUNDED, access=access)
    with serving(app) as url, client_of(url, headers=BEARER) as asking:
        yield asking


def act(client: httpx.Client, path: str, body: Any = None, **headers: str) -> Any:
    """Return the first result of an action that is answered."""
    answer = client.post(f"/api/v1/{path}", json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    return models.Results.model_validate(answer.json()).results[0]


def newest(client: httpx.Client) -> models.Action:
    answer = client.get("/api/v1/audit", params={"limit": 1})
    return models.Audit.model_validate(answer.json()).actions[0]


def test_job_is_submitted_once_by_its_id(client: httpx.Client, submitter: Submitter) -> None:
    body = {"task": ADD, "args": [1, 2], "id": "by-http", "cpus": 0.5, "memory": "1MiB", "priority": 3}
    first, again = (client.post("/api/v1/jobs", json=body).json() for _ in range(2))
    assert (first["id"], first["new"], again["new"]) == ("by-http", True, False)
    assert submitter.value("by-http") == 3
    row = submitter.ended("by-http")
    assert (row.priority, row.request["cpus"], row.request["memory"]) == (3, 0.5, 1024**2)
    other = client.post("/api/v1/jobs", json={**body, "task": FAIL})
    assert (other.status_code, "its task is" in other.json()["detail"]) == (400, True)


def test_whole_numbers_may_have_a_decimal_point(client: httpx.Client, submitter: Submitter) -> None:
    body = {"task": ADD, "args": [1, 2], "id": "with-points", "gpus": 0.0, "limit": {"points": 1.0}, "priority": 3.0}
    answer = client.post("/api/v1/jobs", json=body)
    assert answer.status_code == 200, answer.text
    assert submitter.value("with-points") == 3
    refused = [client.post("/api/v1/jobs", json={**body, "priority": value}) for value in (3.5, "3", True, 10.0)]
    assert [answer.status_code for answer in refused] == [400] * 4


def test_submission_names_its_sender_and_is_no_action(
    client: httpx.Client, platform: Platform, submitter: Submitter
) -> None:
    before = client.get("/api/v1/audit").json()["actions"]
    single = client.post("/api/v1/jobs", json={"task": ADD, "args": [1, 2]}, headers={"X-Forwarded-User": "ann"}).json()
    bulk = client.post("/api/v1/jobs/bulk", json={"jobs": [{"task": ADD, "args": [1, 2]}]}).json()["jobs"][0]
    by_command = platform.celery("submit", ADD, "--args", "[1, 2]").stdout.split()[0]
    senders = []
    for job in (single["id"], bulk["id"], by_command):
        assert submitter.value(job) == 3
        senders.append(decode(bytes(submitter.row(job).message))["headers"]["origin"])
    assert senders == ["ann", "operator@127.0.0.1", operator()]
    assert client.get("/api/v1/audit").json()["actions"] == before


def test_declared_request_holds_where_the_ledger_tells_none(
    client: httpx.Client, platform: Platform, submitter: Submitter, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, job = "tests.nowhere.declared", "declared-by-http"
    with platform.engine.begin() as connection:
        declared = """{"cpus": 0.5, "memory": 1048576, "slots": 1, "licence": 2}"""
        connection.exec_driver_sql("INSERT INTO declarations (name, request) VALUES (%s, %s)", (task, declared))
    monkeypatch.setattr(submitter.app.platform.sending, "ask", lambda _: None)
    submitter.app.amqp.routes[0].published.forget()
    answer = client.post("/api/v1/jobs", json={"task": task, "id": job, "memory": "2MiB"})
    assert answer.status_code == 200, answer.text
    expected = {"cpus": 0.5, "memory": 2 * 1024**2, "slots": 1, "licence": 2}
    assert submitter.row(job).request == expected
    submitter.result(job).revoke()
    submitter.ended(job)
    with platform.engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM declarations WHERE name = %s", (task,))


def test_bulk_accepts_and_refuses_each_job_by_itself(client: httpx.Client, submitter: Submitter) -> None:
    jobs: list[dict[str, Any]] = [{"task": ADD, "args": [n, 1]} for n in range(3)]
    jobs[1]["cpus"] = "many"
    answer = client.post("/api/v1/jobs/bulk", json={"jobs": jobs})
    results = models.SubmittedMany.model_validate(answer.json()).jobs
    assert [result.refused is None for result in results] == [True, False, True]
    assert [submitter.value(result.id) for result in results if result.refused is None] == [1, 3]


def test_bulk_submits_a_job_whose_id_was_refused_before(client: httpx.Client, submitter: Submitter) -> None:
    job = {"task": ADD, "args": [1, 1], "id": "after-a-refusal"}
    answer = client.post("/api/v1/jobs/bulk", json={"jobs": [{**job, "cpus": "many"}, job, job]})
    results = models.SubmittedMany.model_validate(answer.json()).jobs
    assert [(result.new, result.refused is None) for result in results] == [(False, False), (True, True), (False, True)]
    assert submitter.value("after-a-refusal") == 2


def test_beginning_of_an_id_chooses_no_job(client: httpx.Client, submitter: Submitter) -> None:
    submitter.send(ADD, 1, 2, countdown=3600, task_id="order-17")
    for action, body in (("cancel", {}), ("retry", {}), ("priority", {"priority": 5})):
        answer = client.post(f"/api/v1/jobs/order-1/{action}", json=body)
        assert (answer.status_code, answer.json()["reference"]) == (404, "unknown-job"), action
    assert client.post("/api/v1/jobs/order-17/cancel").status_code == 200


def test_job_is_cancelled_reprioritized_and_retried(client: httpx.Client, submitter: Submitter) -> None:
    job = submitter.send(ADD, 1, 2, countdown=3600)
    assert act(client, f"jobs/{job}/priority", {"priority": 9, "reason": "<b>now</b>"})["became"] == "moved"
    assert newest(client).details["reason"] == "<b>now</b>"
    assert act(client, f"jobs/{job}/cancel")["became"] == "cancelled"
    retried = act(client, f"jobs/{job}/retry", **{"X-Forwarded-User": "ann"})["retried_as"]
    assert submitter.value(retried) == 3
    entry = newest(client)
    assert (entry.by, entry.action, entry.targets, entry.outcome) == ("ann", "retry", [job], "done")
    refused = client.post(f"/api/v1/jobs/{job}/retry")
    assert (refused.status_code, refused.json()["reference"]) == (409, "not-retried")
    assert newest(client).outcome == "refused"


@pytest.mark.parametrize("kind", ["cancel", "retry"])
def test_many_jobs_need_their_number_confirmed(kind: str, client: httpx.Client, submitter: Submitter) -> None:
    if kind == "cancel":
        body: dict[str, Any] = {"state": "scheduled"}
        ids = [submitter.send(ADD, 1, 2, countdown=3600) for _ in range(3)]
    else:
        body = {"task": FAIL}
        ids = [submitter.send(FAIL, "no such disk") for _ in range(3)]
        for job in ids:
            submitter.ended(job)
    asked = client.post(f"/api/v1/{kind}", json=body)
    assert (asked.status_code, asked.json()["value"]) == (409, "3")
    done = client.post(f"/api/v1/{kind}", json={**body, "confirm": 3}).json()["results"]
    assert sorted(result["id"] for result in done) == sorted(ids)
    assert (newest(client).action, newest(client).number) == (kind, 3)
    for result in done:
        submitter.ended(result["retried_as"] if kind == "retry" else result["id"])


def test_worker_is_cordoned_drained_and_let_free(client: httpx.Client) -> None:
    for action, status in (("cordon", "cordoned"), ("drain", "draining"), ("uncordon", "uncordoned")):
        assert act(client, f"workers/a/{action}")["status"] == status
        assert (newest(client).action, newest(client).targets) == (action, ["a"])
    unknown = client.post("/api/v1/workers/nobody/cordon")
    assert (unknown.status_code, "there is no worker nobody" in unknown.json()["detail"]) == (400, True)


@pytest.mark.parametrize("part", [{}, {"queue": "render"}, {"task": ADD}, {"tenant": "physics"}])
def test_part_is_paused_and_resumed(part: dict[str, str], client: httpx.Client) -> None:
    assert act(client, "pause", {**part, "reason": "licence"})["paused"] is True
    assert act(client, "resume", part)["before"] is True
    assert act(client, "resume", part)["before"] is False
    assert newest(client).outcome == "refused"


def test_stores_are_reconciled(client: httpx.Client) -> None:
    assert act(client, "reconcile")["all_repaired"] is True
    assert newest(client).details.keys() == {"applied", "drift", "repaired"}


def test_messages_that_were_set_aside_are_listed_and_dropped(client: httpx.Client, platform: Platform) -> None:
    with platform.engine.begin() as connection:
        added = "INSERT INTO quarantine (raw, queue, reason) VALUES ('x', '<b>', 'garbage: x') RETURNING id"
        message = connection.exec_driver_sql(added).scalar_one()
    listed = models.Quarantine.model_validate(client.get("/api/v1/quarantine").json()).messages
    assert [entry.id for entry in listed] == [message]
    assert act(client, "quarantine/drop", {"ids": [message]}) == {"dropped": 1}
    assert act(client, "quarantine/drop", {"ids": [message]}) == {"dropped": 0}
    counted = client.get("/api/v1/dashboard").json()["quarantine"]
    assert (counted["messages"], counted["reasons"]) == (message, [])


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Authorization": ""}, 401),
        ({"Authorization": "Bearer wrong"}, 401),
        ({"Authorization": f"Bearer {VIEWER}"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
    ],
)
def test_action_is_refused_without_right(headers: dict[str, str], status: int, client: httpx.Client) -> None:
    before = newest(client).seq if client.get("/api/v1/audit").json()["actions"] else 0
    answer = client.post("/api/v1/pause", json={}, headers=headers)
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")
    assert client.get("/api/v1/dashboard").json()["pauses"] == []
    assert (newest(client).seq if before else 0) == before


def test_cookie_of_an_operator_reads_and_does_not_act(client: httpx.Client) -> None:
    with httpx.Client(base_url=client.base_url, timeout=client.timeout) as browser:
        for token in (VIEWER, OPERATOR):
            assert browser.post("/login", data={"token": token}).status_code == 303
            assert browser.get("/api/v1/audit").status_code == 200
            assert browser.post("/api/v1/pause", json={}).status_code == 401


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("cancel", {}, 400),
        ("cancel", {"task": "a\0"}, 400),
        ("cancel", {"state": "succeeded"}, 400),
        ("jobs/nothing/cancel", {}, 404),
        ("jobs/nothing/priority", {"priority": 10}, 400),
        ("pause", {"queue": "a", "task": "b"}, 400),
        ("pause", {"everything": True}, 400),
        ("workers/a/drain", {"deadline_seconds": -1}, 400),
        ("jobs", {"task": ""}, 400),
        ("jobs", {"task": ADD, "id": "a b\0"}, 400),
        ("jobs", {"task": ADD, "requests": []}, 400),
        ("jobs", {"task": ADD, "args": ["x" * 2_000_000]}, 413),
        ("jobs/bulk", {"jobs": []}, 400),
        ("quarantine/drop", {"ids": [-1]}, 400),
    ],
)
def test_wrong_action_is_refused_with_advice(path: str, body: Any, status: int, client: httpx.Client) -> None:
    answer = client.post(f"/api/v1/{path}", json=body)
    assert (answer.status_code, bool(answer.json().get("advice"))) == (status, True), answer.text


def test_body_without_length_or_too_large_is_refused(client: httpx.Client) -> None:
    endless = client.post("/api/v1/jobs", content=iter([b"{}"]))
    assert endless.status_code == 411
    both = client.post("/api/v1/jobs", content=b"{}", headers={"Content-Length": "2", "Transfer-Encoding": "chunked"})
    assert both.status_code in (400, 411)
    large = client.post("/api/v1/jobs", content=b"x" * (MAX_BODY + 1))
    assert (large.status_code, large.json()["reference"]) == (413, "body-too-large")


def test_commands_are_in_the_audit(client: httpx.Client, platform: Platform, submitter: Submitter) -> None:
    job = submitter.send(ADD, 1, 2, countdown=3600)
    for words in (("cancel", job), ("cordon", "a", "--by", "bob"), ("uncordon", "a"), ("reconcile",)):
        ended = platform.celery(*words, "--json")
        assert ended.returncode == 0, ended.stderr
        assert json.loads(ended.stdout)
        entry = newest(client)
        assert (entry.via, entry.action, entry.outcome) == ("cli", words[0], "done")
        assert entry.by == "bob" if "bob" in words else "@" in entry.by


def test_running_job_is_not_cut_short_by_cancel(client: httpx.Client, platform: Platform, submitter: Submitter) -> None:
    job = submitter.send(HOLD, "cancelled", cpus=1)
    tasks.started(platform.redis, "cancelled")
    submitter.until(job, "running")
    assert act(client, f"jobs/{job}/cancel")["became"] == "runs-on"
    tasks.let_go(platform.redis, "cancelled")
    submitter.ended(job)
