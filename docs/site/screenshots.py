"""Pictures of the pages for the documents: `make screenshots` runs the demo, and takes one of each page while it runs.

Look at each of them before they are committed: a program cannot tell whether a page looks well.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

from playwright.sync_api import Browser, sync_playwright

from docs.site.pictures import FOREIGN, PICTURES

#: Programs that can be the browser.
BROWSERS: Final = ("chromium", "chromium-browser", "google-chrome")
#: How many times as fast as the trace the demo runs: half of the usual, so that it lasts until the last picture.
SCALE: Final = 5000
#: Size of the window, and dots of a picture for each of its points.
WINDOW: Final = {"width": 1180, "height": 740}
DOTS: Final = 1.5
#: Milliseconds for which a page draws itself anew before its picture is taken.
SETTLE: Final = 2500
#: Runs that the chart has before the first picture, jobs that wait then, and seconds until that is so.
RUNS: Final = 130
WAITING: Final = 3
PATIENCE: Final = 120.0
#: Each picture: its path, in which the newest waiting job stands for {job}, the scheme of its colours, its language.
PAGES: Final = {
    "page": ("/", "light", "en"),
    "page-waiting": ("/waiting", "dark", "en"),
    "page-job": ("/jobs/{job}", "light", "en"),
    "page-jobs": ("/jobs", "light", "en"),
    "page-runs": ("/runs", "light", "en"),
    "page-tasks": ("/tasks", "light", "en"),
}


class Demo(NamedTuple):
    """A running demo: the address of its page, and its process."""

    url: str
    pid: int


@contextmanager
def demo(scale: int = SCALE, **settings: str) -> Iterator[Demo]:
    """Yield a demo, which ends after the block. `settings` are added to its environment."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    options = ("--scale", str(scale), "--worker", "worker-01=72", "--worker", "worker-02=16")
    command = [sys.executable, "-m", "celery", "-A", "platform", "demo", *options]
    process = subprocess.Popen(command, env={**environ, **settings}, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if match := re.search(r"http://\S+", line):
                yield Demo(match[0], process.pid)
                break
        else:
            raise SystemExit("the demo ended before it had a page")
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate()


def read(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return json.load(answer)


def await_jobs(url: str) -> str:
    """Wait until the demo is in full swing, and return the id of the newest job that waits."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        waiting = read(f"{url}api/v1/jobs?state=waiting")["jobs"]
        if len(waiting) >= WAITING and len(read(f"{url}api/v1/runs")["runs"]) >= RUNS:
            return str(waiting[0]["id"])
        time.sleep(0.2)
    raise SystemExit(f"the demo had less than {RUNS} runs and {WAITING} waiting jobs for {PATIENCE:.0f} s")


def take(browser: Browser, url: str, job: str) -> None:
    for name, (path, scheme, language) in PAGES.items():
        options: Any = {"color_scheme": scheme, "locale": language, "viewport": WINDOW, "device_scale_factor": DOTS}
        context = browser.new_context(base_url=url, **options)
        page = context.new_page()
        page.goto(path.format(job=job))
        page.wait_for_selector("#live[data-state=live]")
        page.wait_for_timeout(SETTLE)
        page.screenshot(path=PICTURES / f"{name}.png")
        context.close()
        print(PICTURES / f"{name}.png")


def has_chinese() -> bool:
    """Return True if a font has the characters of each page's switch of languages, or if nobody can tell."""
    program = shutil.which("fc-list")
    return program is None or bool(subprocess.check_output([program, ":lang=zh", "family"]).strip())


def main() -> None:
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        raise SystemExit("There is no Chromium to take the pictures. `make browser` installs it on Debian, as root.")
    if not has_chinese():
        raise SystemExit("There is no font with Chinese characters. Debian: apt install fonts-noto-cjk")
    with sync_playwright() as playwright, demo() as running:
        browser = playwright.chromium.launch(
            executable_path=program, args=["--no-sandbox"] if os.geteuid() == 0 else []
        )
        take(browser, running.url, await_jobs(running.url))
        browser.close()


if __name__ == "__main__":
    main()
