"""Progress bar with rate and remaining time, in a terminal or a notebook; elsewhere nothing is drawn.

Rich counts, and draws in a terminal. In a notebook it would need ipywidgets, so a bar of HTML is drawn there, which
IPython alone can update.
"""

from __future__ import annotations

import threading
import time
from contextlib import AbstractContextManager
from datetime import timedelta
from html import escape
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, Task

#: Seconds over which the rate is averaged.
RATE_OVER: Final = 10.0
#: Seconds between two drawings in a notebook.
NOTEBOOK_EVERY: Final = 0.2
#: Seconds after which a command draws its bar: none is drawn for a command that takes less.
AFTER: Final = 1.0


class ProgressBar(AbstractContextManager["ProgressBar"]):
    """Bar of so many steps, drawn on standard error. `total`: None where it is unknown.

    `after`: seconds after which it appears. `transient`: it disappears at the end. The cursor stays visible, since a
    killed process could not bring it back.
    """

    def __init__(
        self,
        what: str,
        total: float | None,
        *,
        console: Console | None = None,
        after: float = 0.0,
        transient: bool = False,
    ) -> None:
        console = console or _console()
        self._rich: Progress | None = None
        self._notebook: _Notebook | None = None
        if console.is_jupyter or console.is_interactive:
            self._rich = _progress(console, transient)
            self._task = self._rich.add_task(what, total=total)
            self._notebook = _Notebook() if console.is_jupyter else None
        self._after = after
        self._timer: threading.Timer | None = None
        self._lock = threading.Lock()
        self._drawn = self._over = False

    def __enter__(self) -> ProgressBar:
        if self._rich is not None and self._after:
            self._timer = threading.Timer(self._after, self._start)
            self._timer.daemon = True
            self._timer.start()
        elif self._rich is not None:
            self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        with self._lock:
            self._over = True
            if self._drawn and self._rich is not None:
                if self._notebook is not None:
                    self._notebook.draw(self._rich.tasks[0], at_once=True)
                else:
                    self._rich.stop()

    def show(self, done: float, total: float | None = None) -> None:
        """Draw that so many steps are done. `total`: of so many, where that changes."""
        if self._rich is not None:
            self._rich.update(self._task, completed=done, total=total)
            self._draw()

    def advance(self) -> None:
        """Draw that one more step is done."""
        if self._rich is not None:
            self._rich.advance(self._task)
            self._draw()

    def _draw(self) -> None:
        if self._notebook is not None and self._rich is not None and self._drawn:
            self._notebook.draw(self._rich.tasks[0])

    def _start(self) -> None:
        with self._lock:
            if self._over or self._rich is None:
                return
            if self._notebook is None:
                self._rich.start()
            else:
                self._notebook.draw(self._rich.tasks[0])
            self._drawn = True


def command_bar(what: str, total: float | None = None) -> ProgressBar:
    """Return the bar of a command: it appears where the work takes longer than `AFTER`, and disappears at its end."""
    return ProgressBar(what, total, after=AFTER, transient=True)


class _Notebook:
    """Bar of HTML below a cell of a notebook, updated in place."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._next = 0.0

    def draw(self, task: Task, at_once: bool = False) -> None:
        """Draw the bar, unless it was drawn a moment before."""
        if not at_once and time.monotonic() < self._next:
            return
        self._next = time.monotonic() + NOTEBOOK_EVERY
        from IPython.display import HTML, display  # type: ignore[import-not-found,unused-ignore]

        shown = HTML(bar_html(task))
        if self._handle is None:
            self._handle = display(shown, display_id=True)
        else:
            self._handle.update(shown)


def bar_html(task: Task) -> str:
    """Return the bar as HTML: what it counts, the numbers, the rate and the remaining time."""
    left = "" if task.time_remaining is None else f"{timedelta(seconds=int(task.time_remaining))} left"
    of = "" if task.total is None else f"/{task.total:,.0f}"
    words = " · ".join(filter(None, (f"{task.completed:,.0f}{of}", rate_text(task), left)))
    value = "" if task.total is None else f' value="{task.completed:.0f}" max="{task.total:.0f}"'
    bar = f"<progress{value}></progress>"
    return f"<div>{escape(task.description)} {bar} {words}</div>"


def rate_text(task: Task) -> str:
    """Return the steps a second, empty while they are unknown."""
    speed = task.finished_speed or task.speed
    return "" if speed is None else f"{speed:,.0f}/s" if speed >= 10 else f"{speed:.1f}/s"


def _progress(console: Console, transient: bool) -> Progress:
    # Rich is imported late, here and below: no program without a bar loads it.
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        """Steps a second."""

        def render(self, task: Task) -> Text:
            return Text(rate_text(task))

    class Numbers(MofNCompleteColumn):
        """Steps that are done, of how many; empty for work that cannot be counted."""

        def render(self, task: Task) -> Text:
            return super().render(task) if task.total or task.completed else Text()

    columns = (Numbers(), Rate(), TimeElapsedColumn(), TextColumn("left", style="dim"), TimeRemainingColumn())
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        *columns,
        console=console,
        transient=transient,
        speed_estimate_period=RATE_OVER,
        # Standard output may be a pipe. Lines for it must not go to the terminal of the bar.
        redirect_stdout=False,
        redirect_stderr=False,
    )


def _console() -> Console:
    from rich.console import Console

    class BarConsole(Console):
        """Standard error, whose cursor stays visible."""

        def show_cursor(self, show: bool = True) -> bool:
            return False

    return BarConsole(stderr=True)
