"""The progress bar: drawn in a terminal or a notebook, and nowhere else."""

from __future__ import annotations

import io
import sys
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

from celery_capacity.workers.display.progress_bar import ProgressBar
from tests.fixtures.waiting import until


def drawn(**options: Any) -> str:
    output = io.StringIO()
    with ProgressBar("jobs", 4, console=Console(file=output, width=100, **options)) as bar:
        bar.advance()
        bar.show(4)
    return output.getvalue()


def test_bar_has_numbers_in_a_terminal() -> None:
    assert "4/4" in drawn(force_terminal=True)


def test_bar_draws_nothing_off_a_terminal() -> None:
    assert drawn(force_terminal=False) == ""


def test_bar_of_short_work_is_not_drawn() -> None:
    output = io.StringIO()
    console = Console(file=output, width=100, force_terminal=True)
    with ProgressBar("jobs", 4, console=console, after=3600.0) as bar:
        bar.show(4)
    assert output.getvalue() == ""


def test_bar_of_long_work_appears_without_a_step() -> None:
    output = io.StringIO()
    console = Console(file=output, width=100, force_terminal=True)
    with ProgressBar("reading", None, console=console, after=0.01, transient=True):
        until(lambda: "reading" in output.getvalue(), "the bar is drawn")


def test_bar_in_a_notebook_is_html_updated_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []

    class Handle:
        def update(self, html: str) -> None:
            shown.append(html)

    def display(html: str, display_id: bool) -> Handle:
        assert display_id
        shown.append(html)
        return Handle()

    shell = ModuleType("IPython.display")
    shell.HTML, shell.display = str, display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", shell)
    output = io.StringIO()
    with ProgressBar("<b>jobs", 2000, console=Console(file=output, force_jupyter=True)) as bar:
        bar.show(2000)
    assert output.getvalue() == ""
    assert 'value="0" max="2000"' in shown[0]
    assert 'value="2000" max="2000"' in shown[-1]
    assert "2,000/2,000" in shown[-1]
    assert all("&lt;b&gt;jobs" in html and "<b>" not in html for html in shown)
