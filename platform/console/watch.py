"""`--watch`: draw an answer again and again, in place on a terminal, one below the other elsewhere."""

from __future__ import annotations

import io
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from types import FrameType
from typing import TYPE_CHECKING, Final

import click
from rich.text import Text

from celery_capacity.platform.console.command import problem_of_store
from celery_capacity.platform.console.durations import Duration
from celery_capacity.platform.console.terminal import facts, sheet

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live

#: Seconds between two answers, where the caller does not say.
EVERY: Final = 2.0
#: Bounds of these seconds.
SHORTEST: Final = 0.2
LONGEST: Final = 3600.0

#: Option of commands that can be watched.
watch_option: Final = click.option(
    "--watch",
    metavar="[SECONDS]",
    type=Duration(SHORTEST, LONGEST),
    is_flag=False,
    flag_value=EVERY,
    help=f"Show it again every {EVERY:g} s, or every SECONDS, until Ctrl-C.",
)

Draw = Callable[["Console"], None]


class _Terminated(BaseException):
    """SIGTERM came."""


@contextmanager
def giving_back() -> Iterator[None]:
    """Let SIGTERM end the process only when the block has given the terminal back: its echo and its first screen."""

    def unwind(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise _Terminated

    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield  # ignored, or a handler of somebody else
        return
    signal.signal(signal.SIGTERM, unwind)
    try:
        yield
    except _Terminated:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def show(draw: Draw, every: float | None, title: str, in_place: bool = True) -> None:
    """Call `draw` once, or every so many seconds until Ctrl-C, which raises KeyboardInterrupt.

    On a terminal, if `in_place`, each answer takes the place of the one before. An error of the first answer is raised.
    A later one is shown in place of the answer, since a store that went away may come back.
    """
    if every is None:
        draw(facts())
        return
    # The command's own handler ends the process at once, which would leave the terminal in its second screen.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    console = facts()
    if console.is_terminal and in_place:
        with giving_back():
            _in_place(console, every, draw, title)
        return
    while True:
        draw(console)
        console.file.flush()
        time.sleep(every)
        if in_place:
            console.print()


@contextmanager
def whole_screen(live: Live) -> Iterator[Live]:
    """Draw on a screen of its own within the block, and give the first screen back in any case.

    A signal may come while Rich draws for the first time. Rich itself then gives nothing back.
    """
    try:
        with live:
            yield live
    finally:
        live.stop()


def _in_place(console: Console, every: float, draw: Draw, title: str) -> None:
    from rich.live import Live

    shown = picture(console, draw, _head(title, every))
    live = Live(shown, console=console, screen=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
    with whole_screen(live):
        while True:
            live.update(shown, refresh=True)
            time.sleep(every)
            try:
                shown = picture(console, draw, _head(title, every))
            except Exception as error:
                problem = problem_of_store(error)
                if problem is None:
                    raise
                shown = Text.assemble((f"{_head(title, every)}\n\n", "dim"), ("Error: ", "bold red"), str(problem))


def picture(console: Console, draw: Draw, head: str) -> Text:
    """Return a line `head`, and what `draw` prints on a terminal of this size, cut to the lines that it has."""
    output = io.StringIO()
    draw(sheet(console, output))
    lines = output.getvalue().splitlines()
    room = console.height - 2
    if len(lines) > room:
        lines = [*lines[: room - 1], f"… and {len(lines) - room + 1} more lines"]
    shown = Text.from_ansi("\n".join(lines), no_wrap=True, overflow="ellipsis")
    return Text.assemble((f"{head}\n\n", "dim"), shown, no_wrap=True, overflow="ellipsis")


def _head(title: str, every: float) -> str:
    return f"{title} · {datetime.now().astimezone():%H:%M:%S} · every {every:g} s · Ctrl-C ends"
