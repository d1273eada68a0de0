"""Output of all commands: facts to stdout, messages to stderr; colours and bars only on a terminal.

A command computes a value. `print_json` writes it for programs; `table`, `bar` and `Meters` draw it for people. If the
output is not a terminal, lines are plain, without colour, never wrapped or cut.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from celery_capacity.routing.errors import PlatformError

__all__ = [
    "Meter",
    "Meters",
    "OutputLost",
    "bar",
    "facts",
    "fail",
    "harmless",
    "print_json",
    "table",
    "talk",
]

#: Maximum number of characters of a table's line.
WIDEST = 10_000
#: Seconds between two plain progress lines.
PLAIN_INTERVAL = 5.0


def facts() -> Console:
    """Return the console for results (stdout). Each call makes it anew, so that a redirected stdout is respected."""
    return _console(stderr=False)


def talk() -> Console:
    """Return the console for everything else (stderr)."""
    return _console(stderr=True)


def harmless(text: str) -> str:
    """Escape the characters that would steer a terminal, turn the reading direction or break the output.

    Names and errors are text of any submitter.
    """
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() or character in "\n\t" else character.encode("unicode_escape").decode()
        for character in text
    )


class OutputLost(Exception):
    """Standard output or error cannot be written although it has a reader: its disk is full."""


@contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputLost(
            f"the output cannot be written: {error.strerror}. Make room where it goes, or send it elsewhere."
        ) from error


class _Console(Console):
    """A console that prints texts `harmless`."""

    def print(self, *objects: Any, **options: Any) -> None:
        with _writing():
            super().print(*(harmless(item) if isinstance(item, str) else item for item in objects), **options)

    def on_broken_pipe(self) -> None:
        """Raise BrokenPipeError. Rich itself would end the process here, with an exit code of its own."""
        raise BrokenPipeError


def _console(stderr: bool) -> Console:
    console = _Console(stderr=stderr, markup=False, highlight=False, emoji=False)
    console.soft_wrap = not console.is_terminal
    return console


def print_json(value: Any) -> None:
    """Print a JSON value on one line of stdout, flushed, so that a reader sees it while the command goes on."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    # Half of a surrogate pair, from an argument that is not UTF-8, has no encoding. JSON can write it as an escape.
    with _writing():
        print(text if text.isprintable() else json.dumps(value, allow_nan=False), flush=True)


def fail(error: PlatformError, as_json: bool = False) -> None:
    """Print the error and its advice. With `as_json` the problem is the one object on stdout."""
    if as_json:
        print_json(error.to_problem())
    else:
        talk().print(Text.assemble(("Error: ", "bold red"), harmless(str(error))), soft_wrap=True)


def bar(used: float, total: float, width: int = 24, unicode: bool = True) -> str:
    """Draw `used` of `total` in `width` characters: at least one mark if any is used, full only when full."""
    share = min(max(used / total, 0.0), 1.0) if total > 0 else 0.0
    marks = int(share * width)
    if used > 0:
        marks = max(marks, 1)
    full, empty = ("█", "░") if unicode else ("#", ".")
    return full * marks + empty * (width - marks)


def table(console: Console, header: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[int] = ()) -> None:
    """Print rows below a header. Columns numbered in `right` are right-aligned. Plain text off a terminal."""
    cells = [[harmless(cell) for cell in row] for row in rows]
    rights = set(right)
    if console.is_terminal:
        drawn = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for column, name in enumerate(header):
            drawn.add_column(Text(name), justify="right" if column in rights else "left", overflow="fold")
        for row in cells:
            drawn.add_row(*(Text(cell) for cell in row))
        # A row wider than the screen continues on the next line, as the terminal does it. A cell that was broken into a
        # column of bits could be neither read nor copied.
        screen = console.width
        console.width = max(screen, console.measure(drawn, options=console.options.update(width=WIDEST)).maximum)
        console.print(drawn, soft_wrap=True)
        console.width = screen
        return
    lines = [list(header), *cells]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    for line in lines:
        padded = [
            cell.rjust(width) if column in rights else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        console.print("  ".join(padded).rstrip(), soft_wrap=True)


@dataclass(frozen=True)
class Meter:
    """A measured value on its way to a total, such as 64 of the 72 CPUs of a worker."""

    name: str
    value: float
    total: float
    text: str  #: text behind the bar, such as "64/72 CPUs"


class Meters(AbstractContextManager["Meters"]):
    """Meters drawn in place on a terminal; elsewhere one line, at most every `interval` seconds."""

    def __init__(
        self, console: Console, interval: float = PLAIN_INTERVAL, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._console = console
        self._interval = interval
        self._clock = clock
        self._next = clock()
        self._plain = ""
        self._tasks: dict[str, TaskID] = {}
        self._progress: Progress | None = None
        if console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=40),
                TextColumn("{task.fields[text]}", markup=False),
                console=console,
                transient=True,
            )

    def __enter__(self) -> Meters:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
        elif self._plain and kind is None:
            self._say()

    def show(self, meters: Sequence[Meter]) -> None:
        """Draw the present values. A meter with a new name is added below the others."""
        if self._progress is None:
            self._plain = " · ".join(f"{meter.name} {meter.text}" for meter in meters)
            if self._clock() >= self._next:
                self._next = self._clock() + self._interval
                self._say()
            return
        for meter in meters:
            if meter.name not in self._tasks:
                self._tasks[meter.name] = self._progress.add_task(meter.name, text=meter.text, total=meter.total)
            self._progress.update(self._tasks[meter.name], completed=meter.value, total=meter.total, text=meter.text)

    def _say(self) -> None:
        self._console.print(self._plain, soft_wrap=True)
        self._plain = ""
