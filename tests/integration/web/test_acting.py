"""Operators act in a browser: each action once from its page, by the keyboard alone, in both languages.

Hostile texts stay texts in the audit. One browser serves the whole file, on real stores and an app that submits and
revokes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import celery
import pytest

from tests.fixtures.servers.web import serving
from tests.fixtures.stores.staged import Stage
from tests.integration.web.test_browser import CHROMIUM, FOREIGN, NAME, PAYLOADS, Visitor, browser
from tests.integration.web.test_forms import OPERATOR, VIEWER, acting, app

try:
    from axe_playwright_python.sync_playwright import Axe  # type: ignore[import-untyped]
    from playwright.sync_api import Browser, Page, expect
except ImportError:
    pass

__all__ = ["app", "browser"]

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no Chromium: `make browser` installs it on Debian, as root"
)


@pytest.fixture
def url(stage: Stage, app: Any) -> Iterator[str]:
    with serving(acting(stage, app)) as url:
        yield url


@pytest.fixture
def visitor(browser: Browser, url: str) -> Iterator[Visitor]:
    visitor = Visitor(browser, url)
    yield visitor
    visitor.context.close()
    assert visitor.troubles == []


def log_in(visitor: Visitor, token: str = OPERATOR) -> Page:
    page = visitor.page
    page.goto("/login")
    page.get_by_label("Token").fill(token)
    page.get_by_role("button", name="Log in").click()
    page.wait_for_url("**/")
    return page


def act(page: Page, link: str, **fields: str) -> None:
    """Follow the link of an action, fill in its form, and act; wait for the page of the outcome."""
    page.get_by_role("link", name=link, exact=True).first.click()
    for label, value in fields.items():
        page.get_by_label(label, exact=False).fill(value)
    page.locator("main form button").click()
    page.wait_for_url("**/audit/*")
    expect(page.locator("h1 .state")).to_have_text("done")


def submit(app: Any, task: str) -> str:
    job = str(app.send_task(task, args=[1]).id)
    app.platform.sending.flush()
    return job


def test_job_is_acted_on_from_its_page(stage: Stage, app: Any, visitor: Visitor) -> None:
    job = submit(app, "tasks.render")
    page = log_in(visitor)
    page.goto(f"/jobs/{job}")
    page.get_by_role("link", name="Change the priority").click()
    page.get_by_label("Priority").select_option("7")
    page.get_by_label("Reason").fill("customer")
    page.get_by_role("button", name="Change the priority").click()
    expect(page.locator("h1 .state")).to_have_text("done")
    page.get_by_role("link", name=job).click()
    act(page, "Cancel the job")
    page.goto(f"/jobs/{job}")
    act(page, "Retry the job")
    page.goto(f"/jobs/{job}")
    expect(page.locator("main")).to_contain_text("Retried as")
    assert (stage.row(job).priority, stage.row(job).state) == (7, "cancelled")


def test_jobs_of_a_filter_are_acted_on_once_confirmed(stage: Stage, app: Any, visitor: Visitor) -> None:
    ids = [submit(app, "tasks.render") for _ in range(2)]
    other = submit(app, "tasks.other")
    page = log_in(visitor)
    page.goto("/jobs?task=tasks.render")
    page.get_by_role("link", name="Cancel these jobs").click()
    expect(page.locator("main")).to_contain_text("2 jobs match")
    ids.append(submit(app, "tasks.render"))
    page.get_by_role("button", name="Cancel these jobs").click()
    expect(page.get_by_role("alert")).to_contain_text("3 jobs match")
    page.get_by_role("button", name="Cancel these jobs").click()
    expect(page.locator("h1 .state")).to_have_text("done")
    page.goto("/jobs?task=tasks.render&state=cancelled")
    act(page, "Retry these jobs")
    assert {stage.row(job).state for job in ids} == {"cancelled"}
    assert stage.row(other).state != "cancelled"
    # The page of the first form is answered by a conflict on purpose.
    visitor.troubles = [trouble for trouble in visitor.troubles if "409" not in trouble]


def test_worker_is_acted_on_from_the_page(stage: Stage, visitor: Visitor) -> None:
    stage.worker("a", cpus=4000)
    page = log_in(visitor)
    state = page.locator(".worker .state")
    for link, word in (("Cordon", "cordoned"), ("Uncordon", "ready"), ("Drain", "draining"), ("Shut down", "draining")):
        page.goto("/")
        act(page, f"{link}: a")
        page.goto("/")
        expect(state).to_have_text(word)
    assert [action.stops for action in cordons(stage)] == [True]
    act(page, "Uncordon: a")


def test_operator_acts_over_plain_http_under_a_name(stage: Stage, app: Any, browser: Browser) -> None:
    stage.worker("a", cpus=4000)
    with serving(acting(stage, app, NAME)) as url:
        visitor = Visitor(browser, url.replace("127.0.0.1", NAME))
        page = log_in(visitor)
        act(page, "Cordon: a")
        visitor.context.close()
    # The browser says on each page that it isolates no page without TLS.
    assert [trouble for trouble in visitor.troubles if "Cross-Origin-Opener-Policy" not in trouble] == []
    assert len(cordons(stage)) == 1


def cordons(stage: Stage) -> list[Any]:
    with stage.engine.connect() as connection:
        return list(connection.exec_driver_sql("SELECT * FROM cordons"))


def test_parts_are_paused_and_resumed_and_stores_reconciled(stage: Stage, visitor: Visitor) -> None:
    stage.submit(cpus=1000, tenant="physics")
    page = log_in(visitor)
    parts = {
        "Pause the platform": "platform",
        "Pause the task: task": "task task",
        "Pause the queue: celery": "queue celery",
        "Pause the tenant: physics": "tenant physics",
    }
    for link, part in parts.items():
        page.goto("/waiting")
        act(page, link, Reason="licence")
        page.goto("/waiting")
        act(page, f"Resume: {part}".strip())
    page.goto("/")
    act(page, "Reconcile")


def test_messages_that_were_set_aside_are_dropped_and_put_back(stage: Stage, visitor: Visitor) -> None:
    for payload in PAYLOADS[:3]:
        stage.sql("INSERT INTO quarantine (raw, queue, reason) VALUES ('x', :said, :said)", said=payload)
    page = log_in(visitor)
    page.get_by_role("link", name="Messages were set aside.").click()
    expect(page.get_by_role("checkbox")).to_have_count(3)
    assert page.locator(FOREIGN).count() == 0
    for box in page.get_by_role("checkbox").all()[:2]:
        box.check()
    page.get_by_role("button", name="Drop the messages").click()
    page.get_by_role("button", name="Drop the messages").click()
    expect(page.locator("h1 .state")).to_have_text("done")
    stage.sql("UPDATE quarantine SET queue = 'celery'")
    page.goto("/quarantine")
    expect(page.get_by_role("checkbox")).to_have_count(1)
    page.get_by_role("checkbox").check()
    for _ in range(2):
        page.get_by_role("button", name="Put the messages back").click()
    expect(page.locator("h1 .state")).to_have_text("done")
    assert stage.redis.lpop("celery") == b"x"


def test_page_of_messages_follows_and_keeps_what_is_chosen(stage: Stage, visitor: Visitor) -> None:
    add = "INSERT INTO quarantine (raw, queue, reason) VALUES ('x', 'celery', :said)"
    stage.sql(add, said="not_json: first")
    log_in(visitor)
    page = visitor.visit("/quarantine")
    page.get_by_role("checkbox").press("Space")
    stage.sql(add, said="not_json: second")
    expect(page.locator("tbody tr")).to_have_count(2)
    expect(page.locator("tbody tr").first).to_contain_text("second")
    chosen = page.get_by_label("Message 1", exact=True)
    expect(chosen).to_be_checked()
    expect(chosen).to_be_focused()
    expect(page.get_by_label("Message 2", exact=True)).not_to_be_checked()
    page.locator("#drop").focus()
    stage.sql("DELETE FROM quarantine WHERE id = 2")
    expect(page.locator("tbody tr")).to_have_count(1)
    expect(chosen).to_be_checked()
    expect(page.locator("#drop")).to_be_focused()
    stage.sql("DELETE FROM quarantine")
    expect(page.locator("#quarantine")).to_have_text("No message was set aside.")


def test_keyboard_alone_drains_a_worker(stage: Stage, visitor: Visitor) -> None:
    stage.worker("a", cpus=4000)
    page = log_in(visitor)
    drain = page.get_by_role("link", name="Drain: a")
    while not drain.evaluate("link => link === document.activeElement"):
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.get_by_label("Deadline")).to_be_focused()
    page.keyboard.type("10m")
    page.keyboard.press("Tab")
    page.keyboard.type("fan")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("h1 .state")).to_have_text("done")
    expect(page.locator("main")).to_contain_text("600")


def tab_to(page: Page, selector: str) -> None:
    """Press the Tab key until an element has the focus."""
    element = page.locator(selector)
    while not element.evaluate("element => element === document.activeElement"):
        page.keyboard.press("Tab")


def test_keyboard_alone_puts_a_message_back_and_cancels_many(stage: Stage, app: Any, visitor: Visitor) -> None:
    stage.sql("INSERT INTO quarantine (raw, queue, reason) VALUES ('x', 'celery', 'not_json: x')")
    jobs = [submit(app, "tasks.render") for _ in range(2)]
    page = log_in(visitor)
    tab_to(page, "#aside a")
    page.keyboard.press("Enter")
    tab_to(page, "input[name=id]")
    page.keyboard.press("Space")
    for _ in range(2):
        tab_to(page, "main form button:not(.alarm)")
        page.keyboard.press("Enter")
    expect(page.locator("h1 .state")).to_have_text("done")
    assert stage.redis.lpop("celery") == b"x"
    tab_to(page, "nav a[href='/jobs']")
    page.keyboard.press("Enter")
    tab_to(page, "input[name=task]")
    page.keyboard.type("tasks.render")
    page.keyboard.press("Enter")
    tab_to(page, "a[href^='/act/cancel-all']")
    page.keyboard.press("Enter")
    tab_to(page, "main form button")
    page.keyboard.press("Enter")
    expect(page.locator("h1 .state")).to_have_text("done")
    assert {stage.row(job).state for job in jobs} == {"cancelled"}


def test_page_shows_a_viewer_no_action(stage: Stage, visitor: Visitor) -> None:
    stage.worker("a", cpus=4000)
    page = log_in(visitor, VIEWER)
    expect(page.locator(".worker")).to_have_count(1)
    expect(page.locator(".act")).to_have_count(0)
    page.get_by_role("button", name="Log out").click()
    log_in(visitor)
    expect(page.locator(".act")).not_to_have_count(0)


@pytest.mark.parametrize(("locale", "scheme", "width"), [("en-GB", "light", 1280), ("zh-CN", "dark", 360)])
def test_forms_have_no_fault_and_audit_keeps_texts(
    locale: str, scheme: Any, width: int, stage: Stage, app: Any, browser: Browser, url: str
) -> None:
    stage.worker("a", cpus=4000)
    lost = "cpus, memory, capacity, boot_id, hostname, pid, version, seen_at, started_at"
    stage.sql(
        f"INSERT INTO workers (incarnation, name, status, left_at, {lost})"
        f" SELECT 'gone', 'gone' || repeat('-far-away', 6), 'lost', now(), {lost} FROM workers"
    )
    first = app.signature("tasks.render", args=[1])
    parts = [app.signature(name) for name in (*PAYLOADS[:2], *["tasks.part"] * 5)]
    job = (first | celery.group(parts) | app.signature("tasks.join")).apply_async().parent.parent.id
    app.platform.sending.flush()
    for payload in PAYLOADS:
        values = {"said": payload, "many": [payload, "b"], "details": '{"reason": "<b>now</b>", "<b>": "<i>"}'}
        stage.sql(
            "INSERT INTO audit (action, targets, number, made_by, via, details, outcome)"
            " VALUES (:said, :many, 2, :said, 'page', CAST(:details AS jsonb), 'partly')",
            **values,
        )
    stage.sql("INSERT INTO quarantine (raw, queue, reason) VALUES ('x', 'celery', 'not_json: x')")
    options: dict[str, Any] = {"locale": locale, "color_scheme": scheme, "viewport": {"width": width, "height": 800}}
    visitor = Visitor(browser, url, **options)
    page = visitor.page
    page.goto("/login")
    page.locator("#token").fill(OPERATOR)
    page.keyboard.press("Enter")
    page.wait_for_url("**/")
    axe = Axe()
    many = [f"{form}?task=tasks.render" for form in ("cancel-all", "retry-all")]
    messages = [f"{form}?id=1" for form in ("requeue", "drop")]
    actions = (f"cancel?job={job}", f"priority?job={job}", "shutdown?worker=a", "pause", "reconcile", *many, *messages)
    forms = [f"/act/{form}" for form in actions]
    for path in ("/", "/waiting", f"/jobs/{job}", "/quarantine", "/audit", "/audit/1", *forms):
        page.goto(path)
        violations = axe.run(page).response["violations"]
        assert [(path, fault["id"], [node["html"] for node in fault["nodes"]]) for fault in violations] == []
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), path
        assert page.locator(FOREIGN).count() == 0
        if path == f"/jobs/{job}":
            expect(page.locator("#graph text.task")).to_have_count(5)
        if path == "/audit":
            words = page.locator("main").inner_text()
            assert [payload for payload in PAYLOADS if payload not in words] == []
    visitor.context.close()
    assert visitor.troubles == []
