"""Flower in a browser, on a running platform: amounts, the tab Capacity, and its buttons, which work or say why not.

One Flower, one worker and one browser serve the whole file, so the worker's end is the last step of the last test.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from socket import gethostname

import pytest

from celery_capacity.routing.config.embedded import Pair
from tests.fixtures import tasks
from tests.fixtures.jobs.submitting import Submitter, standing_platform
from tests.fixtures.processes.platforms import Platform, Process
from tests.fixtures.waiting import until
from tests.integration.web.test_browser import CHROMIUM, Visitor, browser

with suppress(ImportError):
    from playwright.sync_api import Browser, Page, expect

__all__ = ["browser"]

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no Chromium: `make browser` installs it on Debian, as root"
)

ADDRESS = "http://127.0.0.1:"
USER, PASSWORD = "operator", "0123456789abcdef"
HOLD = "tests.fixtures.tasks.hold"


@pytest.fixture(scope="module")
def platform(server_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    with standing_platform(server_pair, tmp_path_factory.mktemp("flower")) as running:
        yield running


@pytest.fixture(scope="module")
def worker(platform: Platform) -> Process:
    return platform.worker("a", cpus=2, arguments=("-E",))


@pytest.fixture(scope="module")
def url(platform: Platform, worker: Process) -> str:
    login = f"--basic-auth={USER}:{PASSWORD}"
    flower = platform.start("flower", "flower", "--port=0", login, says="Visit me at ")
    return ADDRESS + flower.wait_for("Visit me at ").partition(ADDRESS)[2]


@pytest.fixture
def page(browser: Browser, url: str) -> Iterator[Page]:
    visitor = Visitor(browser, url, http_credentials={"username": USER, "password": PASSWORD})
    yield visitor.page
    visitor.context.close()


def open_worker(page: Page, tab: str) -> None:
    """Open the page of the worker, and one of its tabs."""
    page.goto(f"/worker/a@{gethostname()}")
    page.get_by_role("tab", name=tab).click()


def click(page: Page, button: str, says: str) -> None:
    """Click a button, and wait until Flower says what became of it."""
    page.locator(button).click()
    expect(page.locator("#toast-container").get_by_text(says)).to_be_visible()


def test_tab_leads_to_the_dashboard(page: Page) -> None:
    page.goto("/")
    expect(page.get_by_role("link", name="Capacity")).to_have_attribute("href", "http://127.0.0.1:8000/")


def test_pool_buttons_change_the_slots_or_say_why_not(page: Page, submitter: Submitter) -> None:
    open_worker(page, "Pool")
    for button, says, slots in (("#worker-pool-grow", "Growing", "3"), ("#worker-pool-shrink", "Shrinking", "2")):
        click(page, button, says=says)
        _until_published(submitter, slots)
    page.get_by_label("Minimum autoscale pool size").fill("1")
    page.get_by_label("Maximum autoscale pool size").fill("2")
    click(page, "#worker-pool-autoscale", says="Autoscale not enabled")
    page.get_by_role("button", name="Actions").click()
    click(page, "#worker-pool-restart", says="Pool restarts not enabled")


def _until_published(submitter: Submitter, slots: str) -> None:
    until(lambda: submitter.view("a")["slots"] == slots or None, lambda: f"{slots} slots: {submitter.view('a')}")


def test_rate_limit_of_a_worker_says_why_not(page: Page, platform: Platform) -> None:
    open_worker(page, "Limits")
    row = page.locator("#limits-table tr", has=page.locator("td", has_text=HOLD)).first
    row.get_by_placeholder("Rate").fill("10")
    row.get_by_role("button", name="Apply").click()
    refusal = page.locator("#toast-container").get_by_text("a rate limit holds for the whole cluster")
    expect(refusal).to_contain_text("celery control rate_limit TASK RATE")


def test_task_is_revoked_and_terminated(page: Page, submitter: Submitter) -> None:
    running = submitter.send(HOLD, "flower", cpus=2)
    tasks.started(submitter.platform.redis, "flower")
    waiting = submitter.send(HOLD, "flower", cpus=2)
    _open_task(page, waiting, "#task-revoke")
    assert _facts(page) == ("2 CPUs", "none: it waits")
    _open_task(page, running, "#task-terminate")
    assert _facts(page) == ("2 CPUs", "2 CPUs on a, attempt 1")
    assert _cpus(page) == ["2 CPUs", "2 CPUs", "0 CPUs"]
    for job, button in ((waiting, "#task-revoke"), (running, "#task-terminate")):
        _open_task(page, job, button)
        click(page, button, says=f"Revoked '{job}'")
        assert submitter.ended(job).state == "cancelled"
    # The page of a worker has the amounts of now, though Flower knows those of before.
    until(lambda: _cpus(page) == ["2 CPUs", "0 CPUs", "2 CPUs"] or None, lambda: _cpus(page))
    page.goto(f"/task/{running}")
    assert _facts(page) == ("2 CPUs", "none: released")


def _facts(page: Page) -> tuple[str, str]:
    """Return the request and the allocation on the page of a task."""
    rows = {name: page.locator(f".detail-row:has(dt:text-is('{name}')) dd") for name in ("Request", "Allocation")}
    return rows["Request"].inner_text(), rows["Allocation"].inner_text()


def _cpus(page: Page) -> list[str]:
    """Return capacity, allocated and free CPUs on the page of the worker."""
    open_worker(page, "Pool")
    return page.locator("#platform-capacity tr:has(td:text-is('CPUs')) td").all_inner_texts()[1:]


def _open_task(page: Page, job: str, button: str) -> None:
    """Open the page of a task, as soon as Flower has heard of it."""

    def shown() -> bool | None:
        page.goto(f"/task/{job}")
        return page.locator(button).count() == 1 or None

    until(shown, lambda: page.locator("main").inner_text())


def test_worker_shuts_down(page: Page, worker: Process) -> None:
    open_worker(page, "Pool")
    page.get_by_role("button", name="Actions").click()
    click(page, "#worker-shutdown", says="Shutting down!")
    assert worker.wait() == 0
