"""`top`: its screen and keys on a terminal, and its one print elsewhere."""

from __future__ import annotations

import signal
import sys
import termios

import pytest

from celery_capacity.platform.monitor import screen
from celery_capacity.workers.process.exit_codes import Exit
from tests.fixtures.processes.commanding import Run
from tests.fixtures.processes.terminals import OpenTerminal
from tests.fixtures.stores.staged import Stage
from tests.integration.monitor.test_tables import NO_POSTGRES, answer, platform_environment, run, stage

__all__ = ["platform_environment", "run", "stage"]


def test_top_prints_once_on_a_pipe(stage: Stage, run: Run) -> None:
    shown = run("top")
    assert (shown.exit_code, shown.stderr) == (Exit.OK, "")
    assert "\x1b" not in shown.stdout
    for text in ("4 of 6 allocated", "render-a  ready", "It is too large for every worker", "No worker has room now"):
        assert text in shown.stdout
    seen = answer(run, "top", "--sort", "cpus")
    assert [worker["name"] for worker in seen["workers"]] == ["render-a", "render-b"]
    assert len(seen["groups"]) == 2


def test_top_shows_workers_without_postgres(stage: Stage, run: Run) -> None:
    assert answer(run, "top", DATABASE_URL=NO_POSTGRES)["groups"] is None
    shown = run("top", DATABASE_URL=NO_POSTGRES)
    assert "render-a  ready" in shown.stdout
    assert "Why jobs wait is unknown: " in shown.stdout


def test_screen_gives_the_lines_to_who_needs_them() -> None:
    assert screen.shares(100, 100, None) == (None, None)
    height = screen.OTHER_LINES + 20
    assert screen.shares(100, 100, height) == (10, 10)
    assert screen.shares(100, 2, height)[0] == 18
    assert screen.shares(4, 100, height)[1] == 16
    assert screen.shares(100, 100, 1) == (screen.FEWEST, screen.FEWEST)


def test_keys_sort_and_end_top_on_a_terminal(stage: Stage, open_terminal: OpenTerminal) -> None:
    terminal = open_terminal(sys.executable, "-m", "celery", "-A", "platform", "top", "--every", "3600")
    terminal.wait_for("by name")
    terminal.wait_for("█")
    terminal.type("h")
    terminal.wait_for("by heartbeat")
    terminal.type("q")
    assert terminal.wait() == Exit.OK
    assert "\x1b[?1049l" in terminal.screen


def test_ctrl_c_ends_top_and_gives_the_screen_back(stage: Stage, open_terminal: OpenTerminal) -> None:
    terminal = open_terminal(sys.executable, "-m", "celery", "-A", "platform", "top")
    terminal.wait_for("by name")
    terminal.press_ctrl_c()
    assert terminal.wait() == Exit.OK
    assert "\x1b[?1049l" in terminal.screen


@pytest.mark.parametrize(("words", "text"), [(["top"], "by name"), (["cluster", "--watch"], "every 2 s")])
def test_sigterm_ends_a_screen_and_gives_the_terminal_back(
    stage: Stage, open_terminal: OpenTerminal, words: list[str], text: str
) -> None:
    terminal = open_terminal(sys.executable, "-m", "celery", "-A", "platform", *words)
    before = terminal.modes()[3] | termios.ICANON | termios.ECHO
    terminal.wait_for(text)
    terminal.process.terminate()
    terminal.wait_for("\x1b[?1049l")
    terminal.wait_for("\x1b[?25h")
    assert terminal.wait() == -signal.SIGTERM
    assert terminal.modes()[3] == before
