"""Texts that people read: ages, bars, the words of a verdict."""

from __future__ import annotations

import io
from datetime import UTC, datetime
from typing import Any

import pytest
from rich.cells import cell_len

from celery_capacity.platform.console import render, terminal
from celery_capacity.platform.console.terminal import SafeConsole
from celery_capacity.routing.inspect.overview import Overview
from celery_capacity.routing.inspect.verify import INVARIANTS, Report, Verdict
from celery_capacity.routing.inspect.waiting import BacklogLine
from celery_capacity.routing.inspect.worker_lines import WHOLE, Page, WorkerLine
from celery_capacity.routing.model.reasons import Reason
from celery_capacity.routing.model.request import Request
from celery_capacity.routing.model.states import Store


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (None, "-"),
        (0, "0.0 s"),
        (3.21, "3.2 s"),
        (59, "59 s"),
        (119, "119 s"),
        (120, "2 min"),
        (7200, "2 h"),
        (172800, "2 d"),
    ],
)
def test_ages_are_said_in_the_unit_that_fits(seconds: float | None, said: str) -> None:
    assert render.age(seconds) == said


def test_a_time_that_is_not_there_is_a_dash() -> None:
    assert terminal.moment(None) == "-"
    assert len(terminal.moment(datetime(2026, 1, 2, tzinfo=UTC))) == 19


def _cluster(encoding: str, terminal: bool = True, width: int = 120, names: str = "a", page: Page = WHOLE) -> str:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    workers = tuple(
        WorkerLine(name, "ready", {"cpus": 4000}, {"cpus": 2000}, None, None, None, "life", None, None)
        for name in names
    )
    console = SafeConsole(file=stream, force_terminal=terminal, no_color=True, width=width)
    render.cluster(console, Overview(Store.LEDGER, datetime.now(UTC), workers, (), page=page))
    stream.flush()
    return raw.getvalue().decode(encoding)


def test_page_of_workers_says_where_the_next_one_begins() -> None:
    first, last = (_cluster("utf-8", False, names="abc", page=page) for page in (Page(2), Page(2, "b")))
    assert "3 workers" in first
    assert "6 of 12 allocated" in first
    assert [line.split()[0] for line in first.splitlines() if " ready " in line] == ["a", "b"]
    assert first.endswith("more: --after b\n")
    assert [line.split()[0] for line in last.splitlines() if " ready " in line] == ["c"]
    assert "more:" not in last


def test_bars_are_drawn_with_what_the_output_can_show() -> None:
    assert "████████████░░░░░░░░░░░░" in _cluster("utf-8")
    assert "############............" in _cluster("ascii")


@pytest.mark.parametrize(("screen", "length"), [(70, 18), (30, 8)])
def test_a_bar_is_as_long_as_the_screen_lets_it(screen: int, length: int) -> None:
    line = _cluster("utf-8", width=screen).splitlines()[-1]
    half = length // 2
    assert f" {'█' * half}{'░' * half} " in line
    assert "2/4" in line


def test_off_a_terminal_there_are_neither_colours_nor_bars() -> None:
    output = _cluster("utf-8", terminal=False)
    assert "\x1b" not in output
    assert not {"█", "░"} & set(output)
    assert output.splitlines()[-1].split()[:3] == ["a", "ready", "2/4"]


def test_cluster_names_each_unknown_task_once_and_few_of_many() -> None:
    names = ["t0", *(f"t{number}" for number in range(render.SHOWN_TASKS + 2))]
    backlog = tuple(BacklogLine(Request.of({"cpus": n}), 1, None, name) for n, name in enumerate(names, 1))
    stream = io.StringIO()
    render.cluster(SafeConsole(file=stream, width=200), Overview(Store.LEDGER, datetime.now(UTC), (), backlog))
    shown = stream.getvalue()
    assert shown.count("No live worker knows the task") == render.SHOWN_TASKS
    assert shown.count("PLATFORM_IMPORTS, or your app by celery -A APP worker.") == 1
    assert shown.count("the task t0.") == 1
    assert "The same holds for 2 more tasks." in shown


def _report(at_rest: bool = True, **holds: bool | None) -> Report:
    def verdict(name: str, says: str, only_at_rest: bool) -> Verdict:
        answer = holds.get(name, True)
        return Verdict(name, says, answer, only_at_rest, 3 if answer is False else 0, ("wrong",) * (answer is False))

    return Report(at_rest, tuple(verdict(name, *about) for name, about in INVARIANTS.items()))


def test_the_verdict_is_one_line() -> None:
    assert render.verdict_line(_report()) == "invariants: I1, I2, I3, I4, I6 hold, at rest"
    running: dict[str, Any] = {"I2": None, "I3": None}
    assert (
        render.verdict_line(_report(False, **running))
        == "invariants: I1, I4, I6 hold; I2, I3 hold only at rest, and work runs"
    )
    assert render.verdict_line(_report(I4=False, I6=False)) == "invariants: VIOLATED I4, I6"


def test_violations_beyond_those_shown_are_counted() -> None:
    stream = io.StringIO()
    render.invariants(SafeConsole(file=stream, width=200), _report(I1=False))
    assert "I1 VIOLATED" in stream.getvalue()
    assert "   wrong\n   and 2 more\n" in stream.getvalue()


def test_backlog_fits_the_terminal() -> None:
    stream = io.StringIO()
    request = Request.of({"cpus": 4, "memory": 2**40, "licence-of-the-renderer": 3, "scratch": 2})
    backlog = (
        BacklogLine(request.within("映像処理のための長い名前の列"), 1, 3.0, blocked=Reason.NO_QUEUE),
        BacklogLine(request, 12, 90.0),
    )
    console = SafeConsole(file=stream, force_terminal=True, color_system=None, width=80)
    render.cluster(console, Overview(Store.LEDGER, datetime.now(UTC), (), backlog))
    lines = stream.getvalue().splitlines()
    assert max(map(cell_len, lines)) <= 80
    assert "no worker serves their queue" in lines[-2]
