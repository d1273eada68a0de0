"""The wait of a command on a terminal: it survives a Postgres that went away, and draws no more often than it ticks."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import click
import pytest
from click.testing import CliRunner
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from celery_capacity.platform.actions import waiting
from celery_capacity.platform.actions.wait_codes import timeout_option
from celery_capacity.platform.console import terminal
from celery_capacity.platform.console.terminal import SafeConsole
from celery_capacity.routing.inspect.job_events import JobEvent
from celery_capacity.routing.model.states import State
from celery_capacity.workers.client import following
from celery_capacity.workers.process.exit_codes import Exit

JOBS = [f"job-{number}" for number in range(50)]


class Stores:
    """Stores whose Postgres does not answer. `asked`: how often it was asked."""

    def __init__(self, error: Exception) -> None:
        self.engine = self
        self.asked = 0
        self._error = error

    def connect(self) -> Any:
        self.asked += 1
        raise self._error


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Return what the terminal shows while jobs run and end, the one after the other."""

    def follow(*_: Any, **__: Any) -> Iterator[JobEvent]:
        for state in (State.RUNNING, State.SUCCEEDED):
            yield from (JobEvent(job, state, 1) for job in JOBS)

    stream = io.StringIO()
    console = SafeConsole(file=stream, force_terminal=True, width=120, markup=False, highlight=False)
    monkeypatch.setattr(following, "follow", follow)
    monkeypatch.setattr(waiting, "talk", lambda: console)
    return stream


@pytest.mark.parametrize("error", [OperationalError("SELECT", {}, Exception("it restarts")), PoolTimeout("none free")])
def test_wait_survives_a_restart_of_postgres(screen: io.StringIO, error: Exception) -> None:
    stores: Any = Stores(error)
    awaited = waiting.wait_for(stores, JOBS, None)
    assert awaited.code == Exit.OK
    assert list(awaited.events) == JOBS
    assert "0 of 50 ended, running" in screen.getvalue()
    # It is asked for the first drawing, and for the workers at the end.
    assert stores.asked == 2


def test_wait_prints_ends_above_the_bars_of_the_same_terminal(
    screen: io.StringIO, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stores: Any = Stores(PoolTimeout("none free"))
    monkeypatch.setattr(terminal, "_same_file", lambda *_: True)
    waiting.wait_for(stores, JOBS, None, lambda event: f"{event.job}  {event.state.value}")
    assert "job-7  succeeded\n" in screen.getvalue()
    assert capsys.readouterr().out == ""


def test_wait_prints_ends_to_a_stdout_that_is_no_terminal(
    screen: io.StringIO, capsys: pytest.CaptureFixture[str]
) -> None:
    stores: Any = Stores(PoolTimeout("none free"))
    waiting.wait_for(stores, JOBS, None, lambda event: f"{event.job}  {event.state.value}")
    assert capsys.readouterr().out.splitlines() == [f"{job}  succeeded" for job in JOBS]
    assert "succeeded" not in screen.getvalue()


@pytest.mark.parametrize(("value", "code"), [("inf", 2), ("nan", 2), ("-1", 2), ("0", 0), ("3000000", 0)])
def test_time_out_of_a_wait_is_finite(value: str, code: int) -> None:
    @click.command()
    @timeout_option("Wait no longer than that.")
    def command(timeout: float | None) -> None:
        assert timeout == float(value)

    assert CliRunner().invoke(command, ["--timeout", value]).exit_code == code
