"""Lines that never stop their command: a lost reader, a full disk, and the status line of a terminal."""

from __future__ import annotations

import io
import os
import pty
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import cast

import pytest

from celery_capacity.platform.processes.speaker import ERASE, Speaker
from celery_capacity.platform.processes.supervisor import Child


def lost_with(file: int | str) -> list[int]:
    signals: list[int] = []
    with open(file, "w") as stream:
        speaker = Speaker(stream)
        speaker.on_lost = signals.append
        for number in range(3):
            speaker.say(f"line {number}")
        speaker.close()
    return signals


def all_of(master: int) -> str:
    """Return all that a closed terminal has shown."""
    data = b""
    with suppress(OSError):  # EIO: this was all
        while chunk := os.read(master, 4096):
            data += chunk
    return data.decode()


def test_a_child_has_its_name_in_front_of_its_lines() -> None:
    stream = io.StringIO()
    speaker = Speaker(stream)
    speaker.say_of(cast("Child", type("", (), {"name": "worker-01"})()), "hello\x1b[2J")
    speaker.say("Ended\x1b[2J.")
    assert stream.getvalue() == "[worker-01] hello\\x1b[2J\nEnded\\x1b[2J.\n"
    stream.close()
    speaker.say("nobody hears this")
    speaker.close()


def test_a_pipe_without_a_reader_is_lost_once() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    assert lost_with(writing) == [signal.SIGPIPE]


def test_a_closed_terminal_is_lost_once() -> None:
    master, slave = pty.openpty()
    os.close(master)
    assert lost_with(slave) == [signal.SIGHUP]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_costs_lines_only() -> None:
    assert lost_with("/dev/full") == []


def test_a_closed_standard_error_is_silent() -> None:
    speaker = Speaker(None)
    speaker.say("nobody hears this")
    speaker.status("Waiting")
    speaker.close()


def test_a_status_off_a_terminal_is_a_line_at_times() -> None:
    stream, now = io.StringIO(), [0.0]
    speaker = Speaker(stream, lambda: now[0])
    for second in range(12):
        now[0] = float(second)
        speaker.status("Waiting for a job", f"for {second} s")
    speaker.status("Ending")
    assert stream.getvalue().splitlines() == ["Waiting for a job for 0 s", "Waiting for a job for 10 s", "Ending"]


def test_a_terminal_keeps_its_status_below_the_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    master, slave = pty.openpty()
    with open(slave, "w", encoding="utf-8") as stream:
        speaker = Speaker(stream, lambda: 0.0)
        speaker.status("Waiting", "x" * 200)
        speaker.say("a line")
        speaker.close()
    shown = all_of(master)
    os.close(master)
    waiting = "⠋ " + ("Waiting " + "x" * 200)[: 80 - 3]
    assert shown == f"{ERASE}{waiting}{ERASE}a line\r\n{waiting}{ERASE}"


def test_lines_of_many_threads_are_whole() -> None:
    stream = io.StringIO()
    speaker = Speaker(stream)
    threads = [threading.Thread(target=speaker.say, args=(str(number) * 50,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(stream.getvalue().splitlines()) == [str(number) * 50 for number in range(8)]


def test_standard_error_can_be_given() -> None:
    assert Speaker(sys.__stderr__).terminal in (True, False)
