"""Plugin of pytest for Celery's suite: repeats flaky tests, limits their time, and writes down what came of each.

Celery's suite asks for this by marks of two plugins of pytest, which are not needed here otherwise.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from _pytest.runner import runtestprotocol

#: Variable with the path of the file for the outcomes.
OUTCOMES: Final = "CELERY_SUITE_OUTCOMES"
#: Seconds that a test may take, with its fixtures. The suite says 300; its slowest test takes 20.
WITHIN: Final = 90
#: Times that a test with the mark `flaky` may be repeated. The suite says five.
REPEATS: Final = 1
#: Characters of an error that are kept, from its end.
ERROR_LENGTH: Final = 6000


def pytest_configure(config: pytest.Config) -> None:
    for mark in ("flaky(reruns, reruns_delay, cause): may be repeated", "timeout(timeout): may take so long"):
        config.addinivalue_line("markers", mark)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    yield from _limited(item)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    yield from _limited(item)


def _limited(item: pytest.Item) -> Iterator[None]:
    def late(number: int, frame: Any) -> None:
        raise TimeoutError(f"{item.nodeid} takes more than {WITHIN} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, WITHIN)
    try:
        return (yield)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


#: Errors of the test that runs, those of its subtests included.
_errors: Final[list[str]] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        _errors.append(report.longreprtext)


def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool:
    """Run a test, once more if it failed and may be flaky, and write down its outcome."""
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for left in reversed(range(1 + REPEATS * bool(item.get_closest_marker("flaky")))):
        _errors.clear()
        reports = runtestprotocol(item, nextitem=nextitem, log=False)
        if not (_errors or any(report.failed for report in reports)) or not left:
            break
        item._initrequest()  # type: ignore[attr-defined]
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    _write(item.nodeid, reports)
    return True


def _write(test: str, reports: list[pytest.TestReport]) -> None:
    skipped = any(report.skipped for report in reports)
    outcome = "failed" if _errors else "skipped" if skipped else "passed"
    seconds = sum(report.duration for report in reports)
    error = "\n".join(_errors)[-ERROR_LENGTH:]
    record = {"test": test, "outcome": outcome, "seconds": round(seconds, 2), "error": error}
    with Path(os.environ[OUTCOMES]).open("a") as file:
        file.write(json.dumps(record) + "\n")
