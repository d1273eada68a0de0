"""The API keeps the promises of its document: generated requests, right and wrong, meet no defect and no surprise.

`API_EXAMPLES=300 pytest tests/integration/web/test_openapi.py` also draws many requests for each path at random, and
sequences of requests in which one uses what another made.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from celery_capacity.platform.web.application import Application
from celery_capacity.platform.web.http.login import Access
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
