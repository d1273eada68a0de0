"""`--watch`: in place on a terminal, one answer below the other elsewhere, and errors that pass."""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Iterator

import pytest
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live

from celery_capacity.platform.console import watch
from celery_capacity.routing.errors import StoreUnavailable

#: Answers after which the person presses Ctrl-C.
ANSWERS = 3


@pytest.fixture(autouse=True)
def handler() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the pauses that were asked for. None of them takes time."""
    asked: list[float] = []

    def pause(seconds: float) -> None:
        asked.append(seconds)
        if len(asked) == ANSWERS:
            raise KeyboardInterrupt

    monkeypatch.setattr("celery_capacity.platform.console.watch.time.sleep", pause)
    return asked


def watched(monkeypatch: pytest.MonkeyPatch, terminal: bool, draw: watch.Draw, in_place: bool = True) -> str:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=60, height=8, color_system=None)
    monkeypatch.setattr(watch, "facts", lambda: console)
    with pytest.raises(KeyboardInterrupt):
        watch.show(draw, 5.0, "jobs", in_place)
    return stream.getvalue()


def test_watch_prints_answers_below_each_other_off_a_terminal(
    monkeypatch: pytest.MonkeyPatch, pauses: list[float]
) -> None:
    numbers = iter(range(ANSWERS))
    text = watched(monkeypatch, False, lambda console: console.print(f"answer {next(numbers)}"))
    assert text == "answer 0\n\nanswer 1\n\nanswer 2\n"
    assert pauses == [5.0] * ANSWERS


def test_watch_separates_nothing_where_each_answer_is_a_line(
    monkeypatch: pytest.MonkeyPatch, pauses: list[float]
) -> None:
    assert watched(monkeypatch, True, lambda console: console.print("{}"), in_place=False) == "{}\n" * ANSWERS


@pytest.mark.usefixtures("pauses")
def test_watch_draws_in_place_and_leaves_the_screen_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = iter(range(ANSWERS))
    text = watched(monkeypatch, True, lambda console: console.print(f"answer {next(numbers)}"))
    assert text.index("\x1b[?1049h") < text.index("answer 0") < text.index("answer 2") < text.index("\x1b[?1049l")
    assert "every 5 s" in text


@pytest.mark.usefixtures("pauses")
def test_watch_cuts_an_answer_to_the_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    text = watched(monkeypatch, True, lambda console: console.print("\n".join(f"row {n}" for n in range(20))))
    assert "row 4" in text
    assert "row 5" not in text
    assert "and 15 more lines" in text


@pytest.mark.usefixtures("pauses")
def test_watch_goes_on_after_an_error_of_a_store(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([None, StoreUnavailable("Redis is away"), None])

    def draw(console: Console) -> None:
        error = next(answers)
        if error is not None:
            raise error
        console.print("an answer")

    text = watched(monkeypatch, True, draw)
    assert text.index("an answer") < text.index("Error: Redis is away") < text.rindex("an answer")


def test_watch_raises_an_error_of_the_first_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(_console: Console) -> None:
        raise StoreUnavailable("Redis is away")

    console = Console(file=io.StringIO(), force_terminal=True)
    monkeypatch.setattr(watch, "facts", lambda: console)
    with pytest.raises(StoreUnavailable):
        watch.show(draw, 5.0, "jobs")


class Interrupting:
    """Renderable within which a signal comes."""

    def __rich_console__(self, _console: Console, _options: ConsoleOptions) -> RenderResult:
        sys.exit()


def test_first_screen_comes_back_where_a_signal_comes_while_drawing() -> None:
    output = io.StringIO()
    live = Live(Interrupting(), console=Console(file=output, force_terminal=True), screen=True, auto_refresh=False)
    with pytest.raises(SystemExit), watch.whole_screen(live):
        raise AssertionError("the block is not reached")
    assert "\x1b[?1049l" in output.getvalue()
    assert "\x1b[?25h" in output.getvalue()
