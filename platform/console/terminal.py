"""Output of all commands: facts to stdout, messages to stderr; colours and bars only on a terminal.

A command computes a value. `print_json` writes it for programs; `table`, `bar` and `Meters` draw it for people. If the
output is not a terminal, lines are plain, without colour, never wrapped or cut.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from types import TracebackType
from typing import IO, Any, Final

from rich.console import Console
from rich.control import Control
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from celery_capacity.routing.errors import PlatformError

#: Maximum number of characters of a table's line.
WIDEST = 10_000
#: Style of a state or an outcome of a job, of a worker's status and of a verdict.
STATE_STYLES: Final = {
    "running": "cyan",
    "admitted": "cyan",
    "open": "cyan",
    "waiting": "yellow",
    "accepted": "yellow",
    "scheduled": "blue",
    "replaced": "blue",
    "succeeded": "green",
    "ready": "green",
    "failed": "bold red",
    "lost": "bold red",
    "FAILED": "bold red",
    "VIOLATED": "bold red",
    "expired": "magenta",
    "cancelled": "magenta",
    "draining": "yellow",
    "cordoned": "yellow",
}
#: Text in place of a missing value.
NOTHING: Final = "-"
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


def moment(value: Any) -> str:
    """Format a time as people read it, in their own zone, to the second."""
    if not isinstance(value, datetime):
        return NOTHING
    return value.astimezone().strftime("%Y-%m-%d %H:%M:%S")


class OutputLost(Exception):
    """Standard output or error cannot be written: its disk is full, or its terminal is closed."""

    def __init__(self, error: OSError) -> None:
        super().__init__(
            f"the output cannot be written: {error.strerror}. Make room where it goes, or send it elsewhere."
        )
        self.terminal_closed = error.errno == errno.EIO


@contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputLost(error) from error


def forsake(stream: IO[str] | None) -> None:
    """Redirect a stream to /dev/null, so that its buffered rest does not fail again when the interpreter ends."""
    if stream is not None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


class SafeConsole(Console):
    """A console that prints texts `harmless`, and leaves a line that is wider than the screen to the terminal."""

    def print(self, *objects: Any, **options: Any) -> None:
        # Rich's own drawings, which begin with a control code, must fit the screen.
        options.setdefault("soft_wrap", not any(isinstance(item, Control) for item in objects))
        with _writing():
            super().print(*(harmless(item) if isinstance(item, str) else item for item in objects), **options)

    def on_broken_pipe(self) -> None:
        """Raise BrokenPipeError. Rich itself would end the process here, with an exit code of its own."""
        raise BrokenPipeError


def _console(stderr: bool) -> Console:
    return SafeConsole(stderr=stderr, markup=False, highlight=False, emoji=False)


def sheet(console: Console, output: IO[str]) -> Console:
    """Return a console that draws into a text as it would on this terminal."""
    like: dict[str, Any] = {"width": console.width, "height": console.height, "color_system": console.color_system}
    like |= {"markup": False, "highlight": False, "emoji": False}
    return SafeConsole(file=output, force_terminal=True, no_color=console.no_color, **like)


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
        talk().print(Text.assemble(("Error: ", "bold red"), harmless(str(error))))


def bar(used: float, total: float, width: int = 24, unicode: bool = True) -> str:
    """Draw `used` of `total` in `width` characters: at least one mark if any is used, full only when full."""
    share = min(max(used / total, 0.0), 1.0) if total > 0 else 0.0
    marks = int(share * width)
    if used > 0:
        marks = max(marks, 1)
    full, empty = ("█", "░") if unicode else ("#", ".")
    return full * marks + empty * (width - marks)


def table(
    console: Console, header: Sequence[str], rows: Iterable[Sequence[str | Text]], right: Iterable[int] = ()
) -> None:
    """Print rows below a header. Columns numbered in `right` are right-aligned. Plain text off a terminal.

    A cell that is a `Text` keeps its style on a terminal.
    """
    cells = [[_safe(cell) for cell in row] for row in rows]
    rights = set(right)
    if console.is_terminal:
        drawn = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for column, name in enumerate(header):
            drawn.add_column(Text(name), justify="right" if column in rights else "left", overflow="fold")
        for row in cells:
            drawn.add_row(*row)
        # A row wider than the screen continues on the next line, as the terminal does it. A cell that was broken into a
        # column of bits could be neither read nor copied.
        screen = console.width
        console.width = max(screen, console.measure(drawn, options=console.options.update(width=WIDEST)).maximum)
        console.print(drawn)
        console.width = screen
        return
    lines = [list(header), *([cell.plain for cell in row] for row in cells)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    for line in lines:
        padded = [
            cell.rjust(width) if column in rights else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        console.print("  ".join(padded).rstrip())


def _safe(cell: str | Text) -> Text:
    """Return a cell whose text is harmless."""
    if isinstance(cell, Text):
        return cell if cell.plain.isprintable() else Text(harmless(cell.plain), cell.style)
    return Text(harmless(cell))


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
        self._interrupts = False
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
            # A signal that ends the process at once would leave the terminal without its cursor.
            in_main = threading.current_thread() is threading.main_thread()
            self._interrupts = in_main and signal.getsignal(signal.SIGINT) is signal.SIG_DFL
            if self._interrupts:
                signal.signal(signal.SIGINT, signal.default_int_handler)
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
            if self._interrupts:
                signal.signal(signal.SIGINT, signal.SIG_DFL)
        elif self._plain and kind is None:
            self._say()

    def show(self, meters: Sequence[Meter]) -> None:
        """Draw the present values. A meter with a new name is added below the others, and a missing one removed."""
        meters = [replace(meter, name=_on_one_line(meter.name), text=_on_one_line(meter.text)) for meter in meters]
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
        for name in self._tasks.keys() - {meter.name for meter in meters}:
            self._progress.remove_task(self._tasks.pop(name))

    def print(self, line: str) -> None:
        """Print a result to stdout, above the bars if both are on one terminal."""
        console = facts()
        if self._progress is not None and _same_file(console, self._console):
            console = self._console
        console.print(line)

    def _say(self) -> None:
        self._console.print(self._plain)
        self._plain = ""


def _on_one_line(text: str) -> str:
    """Return the text of a meter, which may come from a task: a line that steers no terminal."""
    return harmless(" ".join(text.split()))


def _same_file(left: Console, right: Console) -> bool:
    try:
        return os.path.sameopenfile(left.file.fileno(), right.file.fileno())
    except (OSError, ValueError):  # a stream without a descriptor
        return False
