"""The pages in a browser: live, by keyboard, in both languages, light and dark, for screen readers, with hostile texts.

One browser serves the whole file. A page is ready when its own scripts say so; no test waits for a time.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest

from tests.fixtures.servers.web import UNBOUNDED, serving
from tests.fixtures.stores.staged import Stage
from tests.integration.web.test_api import application
from tests.integration.web.test_runs import WRITTEN, History, history

__all__ = ["history"]

#: Programs that can be the browser, the first found of them.
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
try:
    from axe_playwright_python.sync_playwright import Axe  # type: ignore[import-untyped]
    from playwright.sync_api import Browser, Dialog, Page, Route, expect, sync_playwright
    from playwright.sync_api import TimeoutError as OutOfPatience
except ImportError:
    CHROMIUM = None

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no Chromium: `make browser` installs it on Debian, as root"
)

#: Milliseconds for which a test waits for what must come: long enough for any machine.
PATIENCE = 60_000
#: A name of a dashboard that does not mean the browser's own machine.
NAME = "dashboard.test"
PAGES = ("/", "/waiting", "/jobs", "/jobs/job-1", "/jobs/job-2", "/jobs/nothing", "/runs", "/tasks", "/api/v1/docs")
#: Pages that do not change.
STILL = ("/api/v1/docs",)
#: Texts that would run as a script, or break out of an element, on a page that shows them as they are.
PAYLOADS = tuple(
    text
    for code in ("alert(1)", "document.body.dataset.broken=1")
    for text in (
        f"<script>{code}</script>",
        f"</title><script>{code}</script>",
        f"</pre><script>{code}</script>",
        f"</textarea><script>{code}</script>",
        f"<!--><script>{code}</script>",
        f"<scr<script>ipt>{code}</script>",
        f"<img src=x onerror={code}>",
        f'"><img src=x onerror={code}>',
        f"'><img src=x onerror={code}>",
        f"<svg onload={code}>",
        f"'\"><svg/onload={code}>",
        f'" autofocus onfocus={code} x="',
        f"' onmouseover='{code}",
        f"<body onload={code}>",
        f"<iframe srcdoc='<script>{code}</script>'>",
        f"<a href=javascript:{code}>x</a>",
        f"javascript:{code}",
        f"<details open ontoggle={code}>",
        f"<math><mtext></form><form><mglyph><svg><mtext><style><path id='</style><img onerror={code} src>'>",
        f"{{{{constructor.constructor('{code}')()}}}}${{{code}}}",
    )
)
#: Elements that only a text which came through would make.
FOREIGN = "img[src=x], iframe, svg[onload], [onerror], [onfocus], [onmouseover], [ontoggle], [href^=javascript], math"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    # A name leads here that no resolver knows.
    options = [f"--host-resolver-rules=MAP {NAME} 127.0.0.1"]
    if os.geteuid() == 0:
        # Chromium does not run as root in its sandbox.
        options.append("--no-sandbox")
    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


class Visitor:
    """A browser window on the dashboard of a stage. `troubles`: errors of scripts, requests and policies."""

    def __init__(self, browser: Browser, url: str, **options: Any) -> None:
        self.context = browser.new_context(base_url=url, **options)
        self.context.set_default_timeout(PATIENCE)
        self.page: Page = self.context.new_page()
        self.troubles: list[str] = []
        self.page.on("console", lambda message: self._note(message.type, message.text))
        self.page.on("pageerror", lambda error: self.troubles.append(str(error)))
        self.page.on("dialog", self._dismiss)
        self.page.on("requestfailed", lambda request: self._note_failure(request.url, str(request.failure)))

    def _note(self, kind: str, words: str) -> None:
        # The page of an unknown job is answered by 404 on purpose.
        if kind in ("error", "warning") and "404" not in words:
            self.troubles.append(words)

    def _note_failure(self, url: str, failure: str) -> None:
        # A page that is left breaks off its stream of events.
        if "ERR_ABORTED" not in failure:
            self.troubles.append(f"{url}: {failure}")

    def _dismiss(self, dialog: Dialog) -> None:
        self.troubles.append(dialog.message)
        dialog.dismiss()

    def visit(self, path: str) -> Page:
        """Open a page, and wait until it follows the events."""
        self.page.goto(path)
        if path in STILL:
            return self.page
        try:
            self.page.wait_for_selector("#live[data-state=live]")
        except OutOfPatience as error:
            state = self.page.locator("#live").get_attribute("data-state")
            raise AssertionError(f"{path} stays {state!r}: {self.troubles}") from error
        if path.startswith("/runs"):
            self.page.wait_for_selector("#chart[data-ready]")
        return self.page


@pytest.fixture
def url(stage: Stage) -> Iterator[str]:
    with serving(application(stage, rates=UNBOUNDED)) as url:
        yield url


@pytest.fixture
def visitor(browser: Browser, url: str) -> Iterator[Visitor]:
    visitor = Visitor(browser, url)
    yield visitor
    visitor.context.close()
    assert visitor.troubles == []


def fill(stage: Stage) -> None:
    """Bring jobs of all kinds on the stage: one that runs, one that waits, and one that never can."""
    stage.worker("a", cpus=4000, labels={"disk": "ssd"})
    for cpus in (3000, 2000, 9000):
        stage.submit(cpus=cpus)


def test_page_follows_a_submission(stage: Stage, visitor: Visitor) -> None:
    stage.worker("a", cpus=4000)
    page = visitor.visit("/")
    expect(page.locator("#totals .figure strong").first).to_have_text("0")
    stage.submit(cpus=3000)
    stage.submit(cpus=2000)
    expect(page.locator("#totals .figure strong").first).to_have_text("3")
    expect(page.locator("#totals a.card strong")).to_have_text("1")
    page.get_by_role("link", name="Waiting", exact=True).click()
    expect(page.locator(".group")).to_have_count(1)
    stage.submit(cpus=9000)
    expect(page.locator(".group.never")).to_contain_text("Too large for every worker")


@pytest.mark.parametrize(
    ("locale", "scheme", "width", "title"), [("en-GB", "light", 1280, "Cluster"), ("zh-CN", "dark", 360, "集群")]
)
def test_page_has_no_fault_in_language_and_scheme(
    locale: str, scheme: Any, width: int, title: str, stage: Stage, browser: Browser, url: str
) -> None:
    fill(stage)
    options: dict[str, Any] = {"locale": locale, "color_scheme": scheme, "viewport": {"width": width, "height": 800}}
    visitor = Visitor(browser, url, **options)
    axe = Axe()
    for path in PAGES:
        page = visitor.visit(path)
        violations = axe.run(page).response["violations"]
        assert [(path, fault["id"], [node["html"] for node in fault["nodes"]]) for fault in violations] == []
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), path
        assert page.get_by_role("link", name=title, exact=True).is_visible()
    visitor.context.close()
    assert visitor.troubles == []


def test_page_about_the_api_is_read_by_keyboard_alone(stage: Stage, visitor: Visitor) -> None:
    page = visitor.visit("/")
    page.get_by_role("link", name="HTTP API").press("Enter")
    page.get_by_role("link", name="GET /api/v1/jobs", exact=True).press("Enter")
    expect(page).to_have_url(re.compile("/api/v1/docs#get-api-v1-jobs$"))
    answer = page.locator("article", has=page.locator("#get-api-v1-jobs")).locator("details")
    answer.locator("summary").press("Enter")
    answer.get_by_role("link", name="Job", exact=True).press("Enter")
    expect(page.locator("#object-job")).to_be_in_viewport()
    assert visitor.troubles == []


def test_wide_screen_has_more_columns_and_lines_that_stay_readable(stage: Stage, visitor: Visitor) -> None:
    for name in "abcdef":
        stage.worker(name, cpus=1000)
    visitor.page.set_viewport_size({"width": 3840, "height": 2160})
    page = visitor.visit("/")
    lefts = "[...document.querySelectorAll('.worker')].map(card => card.getBoundingClientRect().x)"
    page.wait_for_function(f"new Set({lefts}).size >= 5")
    page = visitor.visit("/runs")
    width = "element => element.getBoundingClientRect().width"
    assert page.locator("#chart").evaluate(width) > 3500
    assert page.locator("#keys").evaluate(width) < 1500


def test_page_of_unknown_job_is_live_once_it_was_read_again(stage: Stage, visitor: Visitor) -> None:
    visitor.page.add_init_script(
        "addEventListener('live', () => { document.documentElement.dataset.read = 'yes'; }, true)"
    )
    page = visitor.visit("/jobs/nothing")
    page.wait_for_selector("html[data-read]")
    assert page.locator("#live").get_attribute("data-state") == "live"


def test_page_follows_again_after_a_refusal(stage: Stage, visitor: Visitor) -> None:
    stage.worker("a", cpus=4000)
    answers = iter((503, 429))

    def refuse(route: Route) -> None:
        status = next(answers, None)
        route.fulfill(status=status) if status else route.continue_()

    visitor.page.route("**/api/v1/events*", refuse)
    page = visitor.visit("/")
    stage.submit(cpus=3000)
    expect(page.locator("#totals .figure strong").first).to_have_text("3")
    # The browser notes the two refusals.
    assert len(visitor.troubles) == 2
    visitor.troubles.clear()


def test_switch_of_language_stays_on_the_page(stage: Stage, visitor: Visitor) -> None:
    fill(stage)
    page = visitor.visit("/jobs?state=waiting")
    page.get_by_role("link", name="中文").click()
    page.wait_for_selector("html[lang=zh-Hans]")
    assert page.url.endswith("/jobs?state=waiting")


@WRITTEN
def test_hostile_texts_stay_texts_in_browser(stage: Stage, visitor: Visitor) -> None:
    stage.worker("a", cpus=100_000)
    for payload in PAYLOADS:
        job = stage.submit(cpus=1000)
        stage.sql("UPDATE jobs SET name = :said, worker = :said, error = :said WHERE id = :job", said=payload, job=job)
        stage.sql("UPDATE attempts SET error = :said, worker = :said WHERE job_id = :job", said=payload, job=job)
    job = stage.submit(cpus=200_000)
    arguments = json.dumps({"headers": {"argsrepr": repr(PAYLOADS), "kwargsrepr": "{}"}, "body": "", "properties": {}})
    stage.sql(
        "UPDATE jobs SET message = :message, error = :said, name = :said WHERE id = :job",
        message=arguments.encode(),
        said="\n".join(PAYLOADS),
        job=job,
    )
    for path in ("/", "/waiting", "/jobs", f"/jobs/{job}", "/runs", "/tasks"):
        page = visitor.visit(path)
        assert page.locator(FOREIGN).count() == 0
        assert page.evaluate("document.body.dataset.broken") is None
        if path in ("/jobs", "/tasks", f"/jobs/{job}"):
            words = page.locator("main").inner_text()
            assert [payload for payload in PAYLOADS if payload not in words] == []
    page.goto(f"/runs/hole?worker={quote(PAYLOADS[0])}&at=0.01s")
    assert page.locator(FOREIGN).count() == 0
    assert page.locator("h2").inner_text().startswith(PAYLOADS[0])


@WRITTEN
def test_keyboard_alone_leads_to_a_job_and_into_a_hole(history: History, visitor: Visitor) -> None:
    history.worker("a", cpus=4)
    job = history.ran("a", 590, 580, None, cpus=2)
    history.waits(570, cpus=3)
    page = visitor.visit("/")
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    runs = page.get_by_role("link", name="Runs", exact=True)
    while not runs.evaluate("link => link === document.activeElement"):
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_selector("#chart[data-ready]")
    page.wait_for_selector('#chart[data-runs="1"]')
    while not page.evaluate("document.activeElement.id === 'chart'"):
        page.keyboard.press("Tab")
    for key in ("ArrowRight", "+", "-", "ArrowUp", "ArrowUp"):
        page.keyboard.press(key)
    expect(page.locator("#under")).to_contain_text("2 / 4 CPUs free")
    page.keyboard.press("Enter")
    expect(page.locator("#hole")).to_contain_text("No room now, missing 1 CPU")
    page.keyboard.press("ArrowDown")
    expect(page.locator("#under")).to_contain_text("task · a · 2 CPUs · running")
    page.keyboard.press("Enter")
    page.wait_for_url(f"**/jobs/{job}")


@WRITTEN
def test_chart_follows_and_reads_what_lies_before(history: History, visitor: Visitor) -> None:
    history.worker("a", cpus=4)
    history.ran("a", 3000, 2900, 2800)
    # So long that it stays in sight while the chart follows the time.
    history.ran("a", 600, 590, 5)
    page = visitor.visit("/runs")
    expect(page.locator("#chart")).to_have_attribute("data-runs", "1")
    history.stage.worker("b", cpus=4000)
    history.stage.submit(cpus=4000)
    expect(page.locator("#chart")).to_have_attribute("data-runs", "2")
    for _ in range(7):
        page.get_by_role("button", name="Zoom out").click()
    expect(page.locator("#chart")).to_have_attribute("data-runs", "3")
    page.get_by_role("textbox", name="Worker").fill("b")
    expect(page.locator("#chart")).to_have_attribute("data-runs", "0")
    page.get_by_label("Stretch").select_option("3600")
    page.get_by_role("textbox", name="Worker").fill("")
    expect(page.locator("#chart")).to_have_attribute("data-runs", "3")


@WRITTEN
def test_bar_ends_though_its_end_is_written_late(history: History, visitor: Visitor) -> None:
    history.worker("a", cpus=4)
    job = history.ran("a", 600, 590, None)
    page = visitor.visit("/runs")
    expect(page.locator("#chart")).to_have_attribute("data-open", "1")
    ended = history.moment(300)
    history.stage.sql(
        "UPDATE attempts SET ended_at = :at, outcome = 'succeeded' WHERE job_id = :job", at=ended, job=job
    )
    history.stage.sql("UPDATE jobs SET state = 'succeeded', finished_at = :at WHERE id = :job", at=ended, job=job)
    # Any later change has the page read again.
    history.stage.submit(cpus=4000)
    expect(page.locator("#chart")).to_have_attribute("data-runs", "2")
    expect(page.locator("#chart")).to_have_attribute("data-open", "1")


#: Draw 10,000 short runs of a worker, then a little later, then far later; return how many rectangles each time took.
DRAWN = """async () => {
  const { AXIS, GAP, draw, palette } = await import("/static/draw.js");
  const { rowsOf, stack } = await import("/static/layout.js");
  const runs = Array.from({ length: 10000 }, (_, n) => (
    { job: `job-${n}`, task: "task", worker: "a", cpus: 1, outcome: "succeeded", start: n * 100, end: n * 100 + 90 }));
  const rows = rowsOf(runs, [{ name: "a", cpus: 4 }], "");
  stack(rows, 300 - AXIS, GAP);
  const canvas = Object.assign(document.createElement("canvas"), { width: 1100, height: 300 });
  const context = canvas.getContext("2d");
  const colours = palette();
  const view = { begin: 0, end: 1e6, now: 2e6, scroll: 0 };
  const size = { width: 1100, height: 300, gutter: 100, ratio: 1, cpus: "CPUs",
    x: (time) => 100 + ((time - view.begin) * 1000) / (view.end - view.begin) };
  let drawn = 0;
  const fillRect = CanvasRenderingContext2D.prototype.fillRect;
  CanvasRenderingContext2D.prototype.fillRect = function (...box) { drawn += 1; fillRect.apply(this, box); };
  return [0, 1e5, 9e5].map((later) => {
    Object.assign(view, { begin: later, end: later + 1e6 });
    drawn = 0;
    draw(context, size, rows, view, null, colours);
    return drawn;
  });
}"""


def test_chart_joins_thin_bars_and_moves_what_it_has_drawn(visitor: Visitor) -> None:
    first, moved, beyond = visitor.visit("/tasks").evaluate(DRAWN)
    # A rectangle for each column of pixels, and the row itself.
    assert 1000 <= first <= 1002
    assert moved == 0
    assert 100 <= beyond < first
