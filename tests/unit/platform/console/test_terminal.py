"""Output of commands: bars, tables and progress, on a terminal and elsewhere."""

from __future__ import annotations

import io
import json
import signal

import pytest

from celery_capacity.platform.console import terminal
from celery_capacity.platform.console.terminal import Meter, Meters, SafeConsole
from celery_capacity.routing.errors import InvalidRequest


def plain(width: int = 80) -> tuple[SafeConsole, io.StringIO]:
    stream = io.StringIO()
    return SafeConsole(file=stream, width=width, markup=False, highlight=False), stream


def on_terminal(width: int = 80) -> tuple[SafeConsole, io.StringIO]:
    stream = io.StringIO()
    return SafeConsole(file=stream, width=width, markup=False, highlight=False, force_terminal=True), stream


@pytest.mark.parametrize(
    ("used", "total", "drawn"),
    [
        (0, 72, "░░░░░░░░"),
        (0.001, 72, "█░░░░░░░"),
        (36, 72, "████░░░░"),
        (71.9, 72, "███████░"),
        (72, 72, "████████"),
        (90, 72, "████████"),
        (0, 0, "░░░░░░░░"),
    ],
)
def test_a_bar_shows_any_use_and_is_full_only_when_full(used: float, total: float, drawn: str) -> None:
    assert terminal.bar(used, total, width=8) == drawn


def test_a_bar_can_do_without_unicode() -> None:
    assert terminal.bar(1, 2, width=4, unicode=False) == "##.."


def test_a_table_off_a_terminal_is_aligned_text_that_is_never_cut() -> None:
    console, stream = plain(width=10)
    terminal.table(console, ("name", "cpus"), [("worker-01", "72"), ("[b]", "16")], right=(1,))
    assert stream.getvalue() == "name       cpus\nworker-01    72\n[b]          16\n"


def test_a_table_that_is_wider_than_the_terminal_is_no_puzzle() -> None:
    """Its lines go on in the next one of the screen, as the terminal has it; no cell is broken into bits."""
    console, stream = on_terminal(width=40)
    ids = [f"26d33879-a5f1-4281-bcd4-f02dd5caab7{number}" for number in range(3)]
    terminal.table(console, ("id", "task"), [(job_id, "tasks.render") for job_id in ids])
    lines = stream.getvalue().splitlines()
    assert len(lines) == 1 + len(ids)
    assert all(f"{job_id}  tasks.render" in line for job_id, line in zip(ids, lines[1:], strict=True))


def test_a_table_on_a_terminal_shows_brackets_as_they_are() -> None:
    console, stream = on_terminal()
    terminal.table(console, ("name",), [("[b]",)])
    assert "[b]" in stream.getvalue()


def test_progress_off_a_terminal_is_a_line_now_and_then_and_the_last_one() -> None:
    console, stream = plain()
    now = 0.0
    with Meters(console, interval=5, clock=lambda: now) as meters:
        for second in range(12):
            now = float(second)
            meters.show([Meter("jobs", second, 12, f"{second}/12"), Meter("a", 1, 2, "1/2 CPUs")])
    lines = stream.getvalue().splitlines()
    assert lines == [f"jobs {done}/12 · a 1/2 CPUs" for done in (0, 5, 10, 11)]


def test_progress_on_a_terminal_is_drawn_in_place() -> None:
    console, stream = on_terminal()
    with Meters(console) as meters:
        meters.show([Meter("jobs", 1, 2, "1/2")])
        meters.show([Meter("jobs", 2, 2, "2/2"), Meter("late", 0, 1, "0/1")])
    assert "2/2" in stream.getvalue()
    assert "late" in stream.getvalue()


def test_progress_on_a_terminal_has_no_characters_that_steer_it() -> None:
    console, stream = on_terminal()
    with Meters(console) as meters:
        meters.show([Meter("a\x1b[2J", 1, 2, "1/2 \x1b]0;PWNED\x07\x1b[31mred\nsecond\tline")])
    shown = stream.getvalue()
    assert "1/2 \\x1b]0;PWNED\\x07\\x1b[31mred second line" in shown
    assert "\x1b]0;" not in shown
    assert "\x1b[2J" not in shown


def test_progress_off_a_terminal_keeps_to_one_line() -> None:
    console, stream = plain()
    with Meters(console) as meters:
        meters.show([Meter("a", 1, 2, "1/2 first\nsecond")])
    assert stream.getvalue() == "a 1/2 first second\n"


def test_progress_on_a_terminal_loses_the_bar_of_a_missing_meter() -> None:
    console, _ = on_terminal()
    with Meters(console) as meters:
        meters.show([Meter("jobs", 0, 2, "0/2"), Meter("first", 1, 2, "1/2")])
        meters.show([Meter("jobs", 1, 2, "1/2"), Meter("second", 1, 2, "1/2")])
        assert meters._progress is not None
        assert [task.description for task in meters._progress.tasks] == ["jobs", "second"]


def test_ctrl_c_leaves_the_cursor_while_progress_is_drawn() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        with Meters(plain()[0]):
            assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
        with Meters(on_terminal()[0]):
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with Meters(on_terminal()[0]):
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_json_is_one_line_and_refuses_what_is_not_json(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.print_json({"name": "größe", "nested": [1, None]})
    assert capsys.readouterr().out == '{"name": "größe", "nested": [1, null]}\n'
    with pytest.raises(ValueError):
        terminal.print_json(float("nan"))


def test_a_failure_is_talk_for_people_and_an_object_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    error = InvalidRequest("cpus=[x] is wrong", value="x", advice="Give a number.")
    terminal.fail(error)
    people = capsys.readouterr()
    assert (people.out, people.err) == ("", "Error: cpus=[x] is wrong. Give a number.\n")
    terminal.fail(error, as_json=True)
    programs = capsys.readouterr()
    assert json.loads(programs.out)["reference"] == "invalid-request"
    assert programs.err == ""
