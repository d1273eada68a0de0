"""The pages: hostile texts stay text, the policy of the browser is strict, and the login keeps others out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from sqlalchemy import event

from celery_capacity.platform.web.http.security import HEADERS, PAGE_POLICY
from celery_capacity.platform.web.pages.language import CHINESE
from celery_capacity.routing.recovery import reconcile
from tests.fixtures.servers.web import client_of, serving
from tests.fixtures.stores.books import FOR_EVER
from tests.fixtures.stores.staged import Stage
from tests.fixtures.waiting import until
from tests.integration.web.test_api import application, client

__all__ = ["client"]

TOKEN = "0123456789abcdef"
PAGES = (
    "/",
    "/waiting",
    "/jobs",
    "/jobs/job-1",
    "/tasks",
    "/jobs/nothing",
    "/runs",
    "/runs/hole?worker=a&at=1min",
    "/audit",
    "/api/v1/docs",
)
PAYLOADS = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'><svg/onload=alert(1)>",
    "</title><script>alert(1)</script>",
    "javascript:alert(1)",
    "{{7*7}}${7*7}",
    "&lt;script&gt;",
    "\u202e<b>x</b>\x1b[2J",
)


class Elements(HTMLParser):
    """The elements of a page, with their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


@pytest.fixture
def guarded(stage: Stage) -> Iterator[httpx.Client]:
    with serving(application(stage, TOKEN)) as url, client_of(url) as asking:
        yield asking


@pytest.mark.parametrize("payload", PAYLOADS)
def test_hostile_text_stays_text(payload: str, stage: Stage, client: httpx.Client) -> None:
    stage.worker("a", cpus=1000, labels={"disk": "ssd"})
    job = stage.submit(cpus=1000)
    stage.submit(cpus=1000)
    stage.sql("UPDATE jobs SET name = :said, error = :said", said=payload)
    stage.sql("UPDATE attempts SET error = :said, worker = :said", said=payload)
    for path in (
        "/",
        "/waiting",
        "/jobs",
        f"/jobs/{job}",
        "/tasks",
        "/runs",
        f"/runs/hole?at=0.01s&worker={quote(payload)}",
    ):
        page = client.get(path).text
        assert payload not in page or payload in ("javascript:alert(1)", "{{7*7}}${7*7}")
        for tag, attributes in Elements(page).tags:
            assert tag != "script" or (attributes.get("src") or "").startswith("/static/")
            assert not [name for name in attributes if name.startswith("on") or name == "style"]
            assert (attributes.get("href") or "/").startswith(("/", "#"))
        assert "\x1b" not in page


@pytest.mark.parametrize("path", PAGES)
def test_page_has_strict_policy_and_no_inline_code(path: str, stage: Stage, client: httpx.Client) -> None:
    stage.insert({"cpus": 1000})
    answer = client.get(path)
    assert answer.headers["content-security-policy"] == PAGE_POLICY
    assert "unsafe" not in PAGE_POLICY
    for name in ("X-Content-Type-Options", "X-Frame-Options", "Cache-Control", "Referrer-Policy"):
        assert answer.headers[name] == HEADERS[name]
    assert "<style" not in answer.text
    assert not re.search(r"<script(?![^>]* src=)", answer.text)
    # The page about the API has examples with the address of this server.
    own_address = str(client.base_url).rstrip("/")
    assert "http://" not in answer.text.replace("http://www.w3.org", "").replace(own_address, "")


@pytest.mark.parametrize(
    ("headers", "words"),
    [
        ({"Accept-Language": "zh-CN,zh;q=0.9,en;q=0.8"}, "集群"),
        ({"Accept-Language": "en,zh;q=0.5"}, "Cluster"),
        ({"Accept-Language": "de"}, "Cluster"),
        ({"Accept-Language": "en", "Cookie": "capacity_language=zh"}, "集群"),
    ],
)
def test_page_speaks_language_of_browser_or_switch(
    headers: dict[str, str], words: str, stage: Stage, client: httpx.Client
) -> None:
    assert f"<h1>{words}</h1>" in client.get("/", headers=headers).text


@pytest.mark.parametrize(
    ("language", "words"), [("zh", "它需要 8 CPU，最接近的 a 空闲时也只有 4 CPU。"), ("en", "it needs 8 CPUs")]
)
def test_reason_of_a_wait_is_in_the_language_of_the_page(
    language: str, words: str, stage: Stage, client: httpx.Client
) -> None:
    stage.worker("a", cpus=4000)
    job = stage.submit(cpus=8000)
    for path in ("/waiting", f"/jobs/{job}"):
        page = client.get(path, headers={"Accept-Language": language}).text
        assert words in page
        assert ("it needs" in page) == (language == "en")
    assert "it needs 8 CPUs" in client.get("/api/v1/backlog").json()["groups"][0]["reasons"][0]


def test_every_text_of_templates_has_chinese() -> None:
    folder = Path(__file__).resolve().parents[3] / "platform" / "web" / "pages" / "templates"
    pages = [path.read_text("utf-8") for path in folder.iterdir()]
    texts = {text for page in pages for text in re.findall(r"""\bt\(["']([^"]+?)["']\)""", page)}
    assert len(texts) > 50
    assert texts - set(CHINESE) == set()


def test_switch_of_language_leads_back_here_and_nowhere_else(client: httpx.Client) -> None:
    assert client.get("/language/zh?next=/waiting").headers["location"] == "/waiting"
    for target in ("//evil.example", "https://evil.example", "/\\evil.example"):
        assert client.get("/language/zh", params={"next": target}).headers["location"] == "/"


def test_page_shows_who_decides_without_redis(stage: Stage, client: httpx.Client) -> None:
    assert "banner alarm" not in client.get("/").text
    app = application(stage, reachable=False)
    with serving(app) as url, client_of(url) as asking:
        page = asking.get("/").text
    assert '<p class="banner alarm" role="alert"><strong>Postgres decides.</strong>' in page


def test_page_shows_available_amounts_drift_and_last_reconcile(stage: Stage, client: httpx.Client) -> None:
    stage.worker("a", cpus=4000)
    stage.submit(cpus=3000)
    page = client.get("/").text
    assert "75% allocated · 1 available" in page
    assert "Drift: 0 · not reconciled yet" in page
    assert client.get("/api/v1/dashboard").json()["reconciled_at"] is None
    stage.redis.hset("ledger:held:a", "nobody", "1.1")
    assert reconcile.reconcile(stage.engine, stage.ledger).drift == 1
    noted = datetime.fromisoformat(until(lambda: client.get("/api/v1/dashboard").json()["reconciled_at"], "it is seen"))
    assert abs((datetime.now(UTC) - noted).total_seconds()) < 300
    assert re.search(r"Drift: 1 · reconciled \d+(\.\d)? \w+ ago", client.get("/").text)


@pytest.mark.leaves("I6", because="workers vanish without a word")
def test_page_and_api_name_missing_workers(stage: Stage, client: httpx.Client) -> None:
    for name in ("silent", "dead", "back", "ended", "old", "late"):
        stage.worker(name, cpus=1000)
    columns = "cpus, memory, capacity, boot_id, hostname, pid, version, status, seen_at, started_at"
    stage.sql(
        f"INSERT INTO workers (incarnation, name, {columns}) SELECT 'back-next', name, {columns} FROM workers"
        " WHERE incarnation = 'back-life'"
    )
    rows = {
        "silent": f"seen_at = now() - interval '{FOR_EVER + 5} s'",
        "late": f"seen_at = now() - interval '{FOR_EVER + 9} s'",
        "dead": "status = 'lost', left_at = now() - interval '1 h'",
        "back": "status = 'lost', left_at = now(), started_at = now() - interval '1 h'",
        "ended": "status = 'left', left_at = now()",
        "old": "status = 'lost', left_at = now() - interval '2 days'",
    }
    for name, change in rows.items():
        stage.sql(f"UPDATE workers SET {change} WHERE incarnation = '{name}-life'")
    for name in set(rows) - {"late", "back"}:
        stage.redis.delete(f"ledger:book:{name}", f"worker:{name}")
        stage.redis.zrem("ledger:leases", name)
    missing = until(lambda: client.get("/api/v1/workers").json()["missing"], "the workers are seen as missing")
    assert [(worker["name"], worker["status"]) for worker in missing] == [("dead", "lost"), ("silent", "suspect")]
    page = client.get("/").text
    assert 's-suspect">suspect: <a href="/jobs?worker=silent">silent</a> · host ·' in page
    assert 's-lost">lost: <a href="/jobs?worker=dead">dead</a>' in page


def test_secret_arguments_are_hidden_on_page(stage: Stage, client: httpx.Client) -> None:
    job = stage.insert({"cpus": 1000})
    message = b'{"headers":{"argsrepr":"[1]","kwargsrepr":"{\'password\': \'hunter2\'}"},"body":"","properties":{}}'
    stage.sql("UPDATE jobs SET message = :message", message=message)
    page = client.get(f"/jobs/{job}").text
    assert "[1]" in page
    assert "hunter2" not in page
    assert "hunter2" not in client.get(f"/api/v1/jobs/{job}").text


@pytest.mark.parametrize("path", ["/", "/waiting", "/jobs", "/jobs/job-1", "/tasks"])
def test_page_leads_to_login_where_there_is_a_token(path: str, guarded: httpx.Client) -> None:
    answer = guarded.get(path)
    assert (answer.status_code, answer.headers["location"]) == (303, f"/login?next={path}")


def test_api_asks_for_token_where_there_is_one(guarded: httpx.Client) -> None:
    path = "/api/v1/dashboard"
    assert guarded.get(path).json()["reference"] == "not-logged-in"
    assert guarded.get(path, headers={"Authorization": "Bearer wrong"}).status_code == 401
    assert guarded.get(path, headers={"Cookie": "capacity_session=99999999999.x"}).status_code == 401
    assert guarded.get(path, headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200
    assert guarded.get("/health").status_code == 200


def test_login_gives_a_cookie_that_no_script_and_no_site_uses(guarded: httpx.Client) -> None:
    assert guarded.post("/login", data={"token": "wrong"}).status_code == 401
    answer = guarded.post("/login?next=/waiting", data={"token": TOKEN})
    assert (answer.status_code, answer.headers["location"]) == (303, "/waiting")
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert TOKEN not in cookie
    assert guarded.get("/waiting").status_code == 200
    guarded.post("/logout")
    assert guarded.get("/waiting").status_code == 303


def test_login_is_refused_from_other_site_and_after_many_tries(guarded: httpx.Client) -> None:
    for headers in ({"Sec-Fetch-Site": "cross-site"}, {"Origin": "http://evil.example"}):
        assert guarded.post("/login", data={"token": TOKEN}, headers=headers).status_code == 403
    tries = [guarded.post("/login", data={"token": "wrong"}).status_code for _ in range(12)]
    assert tries[0] == 401
    assert tries[-1] == 429


def test_login_of_endless_size_is_refused(guarded: httpx.Client) -> None:
    assert guarded.post("/login", content=b"token=" + b"x" * 10_000).status_code == 400


def test_page_of_many_workers_stays_light(stage: Stage, client: httpx.Client) -> None:
    for number in range(70):
        stage.worker(f"w{number:02}", cpus=4000, labels={"zone": f"z{number % 2}"})
    for _ in range(200):
        stage.submit(cpus=1000)
    page = client.get("/").text
    assert page.count('<article class="worker"') == 50
    assert len(page.encode()) < 150_000
    assert ">w50<" not in page
    assert ">w69<" in client.get("/?after=w49").text
    groups = client.get("/?group=label:zone").text
    assert groups.count('<article class="worker"') == 2
    assert 'href="/?label=zone%3Dz1"' in groups
    assert client.get("/?group=colour").status_code == 400


def test_waiting_page_costs_by_shapes_and_not_by_jobs(stage: Stage) -> None:
    stage.worker("a", cpus=1000)
    statements: list[str] = []
    app = application(stage)
    with serving(app) as url, client_of(url) as asking:
        listened = event.listens_for(stage.engine, "before_cursor_execute")

        @listened
        def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
            statements.append(statement)

        numbers = []
        for jobs in (2, 40):
            for cpus in range(2000, 2000 + 1000 * 3, 1000):
                for _ in range(jobs):
                    stage.submit(cpus=cpus)
            statements.clear()
            page = asking.get("/waiting", headers={"X-Live": "1"}).text
            numbers.append(len(statements))
            assert page.count('<article class="group') == 3
    assert numbers[0] == numbers[1]
