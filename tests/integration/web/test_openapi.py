"""The API keeps the promises of its document: generated requests, right and wrong, meet no defect and no surprise.

`API_EXAMPLES=300 pytest tests/integration/web/test_openapi.py` also draws many requests for each path at random, and
sequences of requests in which one uses what another made.
"""

from __future__ import annotations

import html
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from celery_capacity.platform.web.application import Application
from celery_capacity.platform.web.http.login import Access
from celery_capacity.platform.web.pages.api_reference import anchor_of
from celery_capacity.platform.web.sources import Sources
from tests.fixtures.servers.web import serving
from tests.fixtures.stores.staged import Stage
from tests.integration.web.test_forms import OPERATOR, VIEWER, acting, app, client

__all__ = ["app", "client"]

#: Requests for each path that a long run draws. Without a number the run has boundary values alone, always the same.
EXAMPLES = os.environ.get("API_EXAMPLES", "")
#: Excluded path. The stream of events has no end, and no body that a schema describes; test_events.py has its tests.
STREAM = "events"
#: Path that only a long run has: its jobs have the model of a single job, and are a fifth of all boundary values.
BULK = "jobs/bulk"
#: Excluded check: each valid request is accepted. A schema cannot tell that a time is over, or which members agree with
#: each other. Such a request is refused with 400 and advice.
UNTOLD = "positive_data_acceptance"
BEARER = {"Authorization": f"Bearer {OPERATOR}"}


@pytest.mark.long(20)
def test_generated_requests_are_answered_as_documented(stage: Stage, app: Any, tmp_path: Path) -> None:
    stage.worker("a", cpus=4000)
    for cpus in (1000, 4000, 9000):
        stage.submit(cpus=cpus)
    drawn = ["--max-examples", EXAMPLES] if EXAMPLES else ["--phases", "coverage", "--generation-deterministic"]
    excluded = STREAM if EXAMPLES else f"({STREAM}|{BULK})"
    with serving(acting(stage, app)) as url:
        command = [
            *(sys.executable, "-m", "schemathesis.cli", "run", f"{url}/api/v1/openapi.json", *drawn),
            *("--header", f"Authorization: Bearer {OPERATOR}", "--continue-on-failure", "--no-color"),
            *("--exclude-path-regex", f"^/api/v1/{excluded}$", "--exclude-checks", UNTOLD),
        ]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("path", "methods"), [("jobs", "GET, POST"), (BULK, "POST"), ("jobs/a", "GET"), ("nowhere", None)]
)
def test_refused_method_names_all_methods_of_the_path(path: str, methods: str | None, client: httpx.Client) -> None:
    answer = client.request("OPTIONS", f"/api/v1/{path}")
    assert (answer.status_code, answer.headers.get("allow")) == (405 if methods else 404, methods)


def test_document_names_the_role_of_each_operation(client: httpx.Client) -> None:
    document = client.get("/api/v1/openapi.json").json()
    schemes = document["components"]["securitySchemes"]
    assert {name: scheme.get("name", scheme["type"]) for name, scheme in schemes.items()} == {
        "bearer": "http",
        "session": "capacity_session",
        "proxyUser": "x-forwarded-user",
    }
    operations = [(method, member) for path in document["paths"].values() for method, member in path.items()]
    viewer, operator = ["viewer"], ["operator"]
    assert {method: member["security"] for method, member in operations} == {
        "get": [{"bearer": viewer}, {"session": viewer}, {}],
        "post": [{"bearer": operator}, {"bearer": operator, "proxyUser": []}],
    }


def test_document_asks_for_a_login_where_reading_is_closed(stage: Stage, app: Any) -> None:
    dashboard = Application(Sources(app.platform, lambda: app), token=OPERATOR, access=Access(VIEWER))
    with serving(dashboard) as url, httpx.Client(base_url=url, timeout=60) as asking:
        assert asking.get("/api/v1/openapi.json").status_code == 401
        document = asking.get("/api/v1/openapi.json", headers=BEARER).json()
    assert set(document["components"]["securitySchemes"]) == {"bearer", "session"}
    assert document["paths"]["/api/v1/jobs"]["get"]["security"] == [{"bearer": ["viewer"]}, {"session": ["viewer"]}]
    assert document["paths"]["/api/v1/jobs"]["post"]["security"] == [{"bearer": ["operator"]}]


def test_document_names_no_answer_that_is_never_given(client: httpx.Client) -> None:
    document = client.get("/api/v1/openapi.json").json()
    answers = {
        status for path in document["paths"].values() for member in path.values() for status in member["responses"]
    }
    assert "422" not in answers
    assert not {"HTTPValidationError", "ValidationError"} & document["components"]["schemas"].keys()
    assert client.get("/api/v1/jobs?limit=none").status_code == 400


def test_page_has_each_operation_with_its_fields(client: httpx.Client) -> None:
    document = client.get("/api/v1/openapi.json").json()
    page = client.get("/api/v1/docs", headers={"Accept-Language": "en"}).text
    parts = dict(re.findall(r'<h3 id="([^"]+)">(.*?)</article>', page, re.DOTALL))
    for path, members in document["paths"].items():
        for method, member in members.items():
            part = parts[anchor_of(method, path)]
            names = [parameter["name"] for parameter in member.get("parameters", ())]
            contents = [member.get("requestBody", {}).get("content", {}), member["responses"]["200"]["content"]]
            for content in contents:
                reference = str(content.get("application/json", {}).get("schema", {}))
                for name in re.findall(r"#/components/schemas/(\w+)", reference):
                    names += document["components"]["schemas"][name]["properties"]
            assert f"<code>{path}</code>" in part
            assert [name for name in names if f"<dt><code>{name}</code>" not in part] == []
            for status in member["responses"]:
                assert status == "304" or status < "400" or status in part
    targets, links = set(re.findall(r' id="([^"]+)"', page)), set(re.findall(r'href="#([^"]+)"', page))
    assert links - targets == set()
    assert "text such as &#34;10m&#34;" in page
    assert '<a href="/api/v1/docs">HTTP API</a>' in client.get("/", headers={"Accept-Language": "en"}).text


def test_examples_of_page_are_requests_that_are_understood(stage: Stage, client: httpx.Client) -> None:
    stage.worker("a", cpus=4000)
    job = stage.submit(cpus=1000)
    page = client.get("/api/v1/docs").text
    examples = [html.unescape(text) for text in re.findall(r'<pre class="call"><code>(.*?)</code>', page, re.DOTALL)]
    assert len(examples) > 20
    for example in examples:
        typed = example.replace("$TOKEN", OPERATOR).replace("/JOB_ID", f"/{job}").replace("/NAME/", "/a/")
        words = shlex.split(typed)
        if "-sN" in words:
            continue
        headers = dict(words[place + 1].split(": ", 1) for place, word in enumerate(words) if word == "-H")
        content = words[words.index("-d") + 1] if "-d" in words else None
        method = "POST" if "-X" in words or content is not None else "GET"
        answer = client.request(method, words[-1], headers=headers, content=content)
        # An answer of 409 asks to confirm a number, or tells that the job cannot be retried.
        assert answer.status_code in (200, 409), f"{typed}: {answer.text}"


def test_page_about_the_api_leads_to_a_login_where_reading_is_closed(stage: Stage, app: Any) -> None:
    dashboard = Application(Sources(app.platform, lambda: app), token=OPERATOR, access=Access(VIEWER))
    with serving(dashboard) as url, httpx.Client(base_url=url, timeout=60) as asking:
        answer = asking.get("/api/v1/docs")
        assert (answer.status_code, answer.headers["location"]) == (303, "/login?next=/api/v1/docs")
        assert "role viewer" in asking.get("/api/v1/docs", headers={**BEARER, "Accept-Language": "en"}).text


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("jobs/a/cancel", {"terminate": 0}),
        ("retry", {"confirm": False}),
        ("workers/a/drain", {"deadline_seconds": False}),
        ("quarantine/drop", {"ids": [False]}),
        ("quarantine/requeue", {"ids": [False]}),
        ("jobs", {"task": "t", "limit": {"key": False}}),
    ],
)
def test_value_of_another_type_is_refused(path: str, body: dict[str, Any], client: httpx.Client) -> None:
    answer = client.post(f"/api/v1/{path}", json=body, headers=BEARER)
    assert (answer.status_code, answer.json()["reference"]) == (400, "invalid-request"), answer.text
