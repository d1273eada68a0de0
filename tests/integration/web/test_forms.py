"""The forms of the pages without a browser: who sees them, what they refuse, and what they do for each action."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from celery_capacity.platform.web.application import Application
from celery_capacity.platform.web.http.login import Access
from celery_capacity.platform.web.pages.forms import FORMS
from celery_capacity.platform.web.pages.language import CHINESE
from celery_capacity.platform.web.sources import Sources
from celery_capacity.workers.app.install import create_app
from tests.fixtures.servers.web import UNBOUNDED, client_of, serving
from tests.fixtures.stores.staged import Stage

OPERATOR, VIEWER = "0123456789abcdef", "fedcba9876543210"


def acting(stage: Stage, app: Any, name: str = "localhost") -> Application:
    """Return a dashboard of this name in which operators act on the stores of a stage."""
    access = Access(VIEWER, open_reading=True, user_header="x-forwarded-user")
    return Application(Sources(app.platform, lambda: app), name=name, token=OPERATOR, rates=UNBOUNDED, access=access)


@pytest.fixture
def app(stage: Stage) -> Iterator[Any]:
    app = create_app("acting", resolve=lambda _: stage.settings)
    yield app
    # No worker here brings Postgres what the ledger noted.
    stage.apply()
    app.close()
    stores = app.platform
    for part in (stores.sending, stores.watcher, stores.inserter):
        part.close()
    stores.engine.dispose()
    stores.redis.close()


@pytest.fixture
def client(stage: Stage, app: Any) -> Iterator[httpx.Client]:
    with serving(acting(stage, app)) as url, client_of(url) as asking:
        yield asking


def log_in(client: httpx.Client, token: str = OPERATOR) -> None:
    assert client.post("/login", data={"token": token}).status_code == 303


def form_token(client: httpx.Client, path: str = "/act/reconcile") -> str:
    match = re.search(r'name="form_token" value="([0-9a-f]+)"', client.get(path).text)
    assert match is not None
    return match[1]


def actions(client: httpx.Client) -> list[dict[str, Any]]:
    return list(client.get("/api/v1/audit").json()["actions"])


def test_every_text_of_forms_has_chinese() -> None:
    assert {text for form in FORMS.values() for text in (form.title, form.text)} - set(CHINESE) == set()


def test_page_has_no_action_unless_an_operator_logs_in(stage: Stage, client: httpx.Client) -> None:
    stage.worker("a", cpus=1000)
    job = stage.submit(cpus=2000)
    paths = ("/", "/waiting", "/jobs?task=task", f"/jobs/{job}")
    assert [path for path in paths if "/act/" in client.get(path).text] == []
    log_in(client, VIEWER)
    assert [path for path in paths if "/act/" in client.get(path).text] == []
    log_in(client)
    assert [path for path in paths if "/act/" not in client.get(path).text] == []


#: Forms without the token of the session (None: with it), or from elsewhere.
FOREIGN: tuple[tuple[dict[str, str | None], dict[str, str]], ...] = (
    ({}, {}),
    ({"form_token": ""}, {}),
    ({"form_token": "0" * 64}, {}),
    ({"form_token": "\udcff"}, {}),
    ({}, {"Authorization": f"Bearer {OPERATOR}"}),
    ({"form_token": None}, {"Sec-Fetch-Site": "cross-site"}),
    ({"form_token": None}, {"Sec-Fetch-Site": "same-site"}),
    ({"form_token": None}, {"Origin": "http://evil.example"}),
    ({"form_token": None}, {"Origin": "null"}),
)


def test_form_of_another_site_is_refused(stage: Stage, client: httpx.Client) -> None:
    log_in(client)
    right = form_token(client)
    answers = []
    for values, headers in FOREIGN:
        body = "&".join(f"{name}={right if value is None else value}" for name, value in values.items())
        content = body.encode("utf-8", "surrogateescape")
        answers.append(client.post("/act/pause", content=content, headers=headers).status_code)
    assert answers == [403] * len(FOREIGN)
    assert (actions(client), client.get("/api/v1/dashboard").json()["pauses"]) == ([], [])


def test_form_of_a_viewer_or_of_nobody_is_refused(stage: Stage, client: httpx.Client) -> None:
    log_in(client)
    stolen = form_token(client)
    client.cookies.clear()
    answer = client.post("/act/pause", data={"form_token": stolen})
    assert (answer.status_code, answer.headers["location"].partition("?")[0]) == (303, "/login")
    log_in(client, VIEWER)
    for answer in (client.post("/act/pause", data={"form_token": stolen}), client.get("/act/pause")):
        assert answer.status_code == 403
    assert actions(client) == []


def test_form_acts_by_no_get_and_its_cookie_by_no_api(stage: Stage, client: httpx.Client) -> None:
    log_in(client)
    assert client.get(f"/act/pause?form_token={form_token(client)}").status_code == 200
    assert client.post("/api/v1/pause", json={}).status_code == 401
    assert actions(client) == []


#: Wrong forms by their paths and values (None: a page that is read), with the status of the answer.
WRONG: tuple[tuple[str, dict[str, str] | None, int], ...] = (
    ("/act/nothing", {}, 400),
    ("/act/cancel?job=nothing", {}, 404),
    ("/act/cancel?job=%00", {}, 400),
    ("/act/cancel", {}, 400),
    ("/act/cancel-all", {}, 400),
    ("/act/cancel-all?state=succeeded", {}, 400),
    ("/act/cancel-all?state=strange", {}, 400),
    ("/act/cancel-all?task=%00", {}, 400),
    ("/act/retry-all?state=running", {}, 400),
    ("/act/cancel-all?state=waiting", {}, 409),
    ("/act/cancel-all?state=waiting", {"number": "7" * 30}, 409),
    ("/act/drain?worker=a", {"deadline": "soon"}, 400),
    ("/act/drain?worker=nobody", {}, 400),
    ("/act/cordon?worker=a", {"reason": "x" * 501}, 400),
    ("/act/cordon?worker=a", {"reason": "x" * 20_000}, 400),
    ("/act/pause?queue=a&task=b", {}, 400),
    ("/act/pause?tenant=%00", {}, 400),
    ("/act/priority?job=job-1", {"priority": "77"}, 400),
    ("/act/priority?job=job-1", {"priority": "x"}, 400),
    ("/act/drop", {}, 400),
    ("/act/drop?id=x", {}, 400),
    ("/audit/7", None, 404),
    ("/audit/x", None, 404),
    ("/audit?cursor=x", None, 400),
    ("/quarantine?cursor=x", None, 400),
)


def test_wrong_form_is_refused_on_a_page(stage: Stage, client: httpx.Client) -> None:
    stage.worker("a", cpus=1000)
    stage.submit(cpus=2000)
    log_in(client)
    token = {"form_token": form_token(client)}
    for path, values, status in WRONG:
        answer = client.get(path) if values is None else client.post(path, data={**values, **token})
        assert (path, answer.status_code) == (path, status)
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
        assert 'class="banner alarm" role="alert"' in answer.text
    assert {action["outcome"] for action in actions(client)} == {"refused"}


def test_form_puts_messages_back_and_says_why_one_stays(stage: Stage, client: httpx.Client) -> None:
    for queue in ("celery", "nobodys"):
        stage.sql("INSERT INTO quarantine (raw, queue, reason) VALUES ('x', :queue, 'not_json: x')", queue=queue)
    log_in(client)
    assert 'formaction="/act/requeue"' in client.get("/quarantine").text
    unserved, served = (message["id"] for message in client.get("/api/v1/quarantine").json()["messages"])
    token = {"form_token": form_token(client)}
    refused = client.post(f"/act/requeue?id={unserved}", data=token)
    assert (refused.status_code, "start a worker with -Q nobodys" in refused.text) == (400, True)
    assert client.post(f"/act/requeue?id={unserved}&id={served}", data=token).status_code == 303
    both, alone = actions(client)
    reason = both["details"].pop("why")
    assert reason == f"{unserved}: nobody serves its queue: start a worker with -Q nobodys"
    assert reason in client.get(f"/audit/{both['seq']}").text
    assert (both["outcome"], both["details"]) == ("partly", {"unknown-queue": 1, "requeued": 1})
    assert (alone["outcome"], alone["details"]) == ("refused", {"unknown-queue": 1, "why": reason})
    assert stage.redis.lpop("celery") == b"x"


def test_action_names_the_user_of_the_proxy_and_the_page(stage: Stage, client: httpx.Client) -> None:
    stage.worker("a", cpus=1000)
    log_in(client)
    values = {"form_token": form_token(client), "reason": "fan", "deadline": "10m"}
    answer = client.post("/act/drain?worker=a", data=values, headers={"X-Forwarded-User": "ann"})
    (action,) = actions(client)
    assert (answer.status_code, answer.headers["location"]) == (303, f"/audit/{action['seq']}")
    assert (action["by"], action["via"], action["action"], action["targets"]) == ("ann", "page", "drain", ["a"])
    assert action["details"] == {"reason": "fan", "deadline_seconds": 600.0}
    assert "600" in client.get(answer.headers["location"]).text


def test_login_leads_back_to_the_form(stage: Stage, client: httpx.Client) -> None:
    leads = client.get("/act/pause?queue=render").headers["location"]
    assert client.post(leads, data={"token": OPERATOR}).headers["location"] == "/act/pause?queue=render"


def test_page_of_retries_leaves_out_what_was_retried(stage: Stage, app: Any, client: httpx.Client) -> None:
    log_in(client)
    ids = [str(app.send_task("t", args=[number]).id) for number in range(3)]
    app.platform.sending.flush()
    token = {"form_token": form_token(client)}
    cancelled = client.post("/act/cancel-all?task=t", data={**token, "number": "3"}, follow_redirects=True)
    assert cancelled.text.count("/jobs/") == 3
    client.post(f"/act/retry?job={ids[0]}", data=token)
    page = client.get("/act/retry-all?task=t&state=cancelled").text
    assert [job in page for job in ids] == [False, True, True]
    again = client.post(f"/act/retry?job={ids[0]}", data=token)
    assert (again.status_code, "was retried already" in again.text) == (409, True)
    client.post("/act/cancel-all?task=t", data={**token, "number": "1"})
