"""Colours, bars and questions are for a terminal; a pipe gets plain lines, and NO_COLOR is kept."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from celery_capacity import migrations
from celery_capacity.workers.process.exit_codes import Exit
from tests.fixtures.documents.shapes import assert_shape
from tests.fixtures.processes.commanding import in_process
from tests.fixtures.processes.platforms import Platform
from tests.fixtures.processes.terminals import Shown, on_terminal
from tests.fixtures.stores.books import FOR_EVER
from tests.fixtures.stores.staged import Stage

ESCAPE = "\x1b"
#: A terminal's codes for colour: 30 to 37 and 90 to 97, alone or with bold.
COLOUR = re.compile(r"\x1b\[(\d+;)*(3|9)[0-7]m")
BARS = set("█░━#")


def show(platform: Platform, *words: str, **options: Any) -> Shown:
    arguments = [sys.executable, "-m", "celery", *words]
    inherited = {name: value for name, value in platform.environment.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    environment = {**inherited, **options.pop("environment", {})}
    return on_terminal(arguments, environment, platform.folder, **options)


@pytest.fixture
def platform_environment(platform_environment: dict[str, str]) -> dict[str, str]:
    """Return the usual variables with leases that outlast a slow command: nobody renews the staged worker's lease."""
    return {**platform_environment, "PLATFORM_WORKER_TTL": str(FOR_EVER), "PLATFORM_LOST_AFTER": str(FOR_EVER)}


@pytest.fixture
def stage(platform: Platform) -> Any:
    # The lease outlives the start of a command on a busy machine.
    stage = Stage(platform.engine, replace(platform.settings, worker_ttl=60.0, lost_after=75.0))
    stage.worker("big", cpus=72_000)
    stage.submit(cpus=36_000)
    yield stage
    stage.close()


@pytest.mark.long
def test_a_terminal_gets_bars_and_colours(platform: Platform, stage: Stage) -> None:
    shown = show(platform, "-A", "platform", "cluster")
    assert shown.code == Exit.OK
    assert "████░░░░" in shown.screen
    assert ESCAPE in shown.screen
    missing = show(platform, "-A", "platform", "job", "nothing")
    assert missing.code == Exit.FAILED
    assert COLOUR.search(missing.screen)


def test_ctrl_c_ends_a_watch_and_leaves_the_screen_as_it_was(platform: Platform, stage: Stage) -> None:
    master, slave = pty.openpty()
    arguments = [sys.executable, "-m", "celery", "-A", "platform", "cluster", "--watch", "0.3"]
    environment = {**platform.environment, "TERM": "xterm-256color"}
    process = subprocess.Popen(arguments, env=environment, cwd=platform.folder, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    screen = b""
    while screen.count(b"backlog 0 waiting") < 2:  # drawn twice
        screen += os.read(master, 4096)
    process.send_signal(signal.SIGINT)
    reader = threading.Thread(target=_drain, args=(master, rest := bytearray()))
    reader.start()
    assert process.wait(timeout=60) == Exit.INTERRUPTED
    reader.join(timeout=60)
    assert b"\x1b[?1049l" in rest
    os.close(master)


def _drain(descriptor: int, into: bytearray) -> None:
    with suppress(OSError):  # the end of a terminal without a process
        while part := os.read(descriptor, 4096):
            into.extend(part)


@pytest.mark.parametrize(("option", "environment"), [((), {"NO_COLOR": "1"}), (("--no-color",), {})])
def test_colours_can_be_switched_off(platform: Platform, option: tuple[str, ...], environment: dict[str, str]) -> None:
    missing = show(platform, "-A", "platform", *option, "job", "nothing", environment=environment)
    assert "there is no job nothing" in missing.screen
    assert not COLOUR.search(missing.screen)


@pytest.mark.parametrize("words", ["cluster", "jobs", "job job-1", "verify", "reconcile", "db current", "db upgrade"])
def test_a_pipe_gets_plain_facts_and_nothing_else(platform: Platform, stage: Stage, words: str) -> None:
    result = in_process(platform.environment)(*words.split())
    assert result.exit_code == Exit.OK
    assert result.stderr == ""
    assert ESCAPE not in result.stdout
    assert not BARS & set(result.stdout)


@pytest.mark.long
def test_progress_is_drawn_on_the_terminal_while_the_facts_go_to_a_pipe(platform: Platform, tmp_path: Path) -> None:
    trace = tmp_path / "t.csv"
    trace.write_text("submit,run,cpus\n0,1,2\n1,1,1\n")
    words = ("demo", "--trace", str(trace), "--scale", "10", "--worker", "small=2", "--json")
    shown = show(platform, "-A", "platform", *words, pipe=True)
    assert shown.code == Exit.OK, shown.screen
    assert_shape("demo", json.loads(shown.piped))
    assert "━" in shown.screen
    assert ESCAPE in shown.screen


@pytest.mark.parametrize("typed", ["n\n", "\x04"])  # no, and Ctrl-D
def test_a_question_is_asked_on_a_terminal_and_no_is_an_answer(platform: Platform, typed: str) -> None:
    shown = show(platform, "-A", "platform", "db", "downgrade", "base", typed=typed)
    assert "Take the tables back from" in shown.screen
    assert "0 jobs are in the tables" in shown.screen
    assert (shown.code, migrations.current(platform.engine)) == (Exit.FAILED, migrations.HEAD)
    assert "nothing was changed. --force does it without asking." in shown.screen
