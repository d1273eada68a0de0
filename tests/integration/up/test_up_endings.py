"""`up` leaves nothing behind, whatever becomes of its terminal or of the reader of its output."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from celery_capacity.platform.processes.supervisor import celery_command
from celery_capacity.workers.process.exit_codes import Exit
from tests.fixtures.processes.left_over import until_nothing_is_left
from tests.fixtures.processes.platforms import Platform
from tests.fixtures.processes.terminals import OpenTerminal
from tests.fixtures.waiting import until

#: Words of `up` on servers that run, with a worker that is soon ready.
UP = ("up", "--worker", "a=1", "--pool", "threads")

#: Line of a shell that ends with the exit code of the first of its two commands.
PIPED = 'set -o pipefail; "$0" -P -m celery -A platform {words} 2>&1 | {reader}; exit ${{PIPESTATUS[0]}}'

#: Output of `up` at several moments: a child has started, a worker is ready, and all is.
MOMENTS = ("Dashboard: http", " ready.", "Ctrl-C ends")


def shell(reader: str) -> tuple[str, ...]:
    return ("/bin/bash", "-c", PIPED.format(words=" ".join(UP), reader=reader), sys.executable)


@pytest.mark.long
def test_ctrl_c_that_ends_tee_too_ends_all_children(open_terminal: OpenTerminal, mark: str, tmp_path: Path) -> None:
    up = open_terminal(*shell(f"tee {tmp_path}/log"))
    up.wait_for("Ctrl-C ends")
    up.press_ctrl_c()
    assert up.wait() in (0, Exit.BROKEN_PIPE, -signal.SIGINT)
    until_nothing_is_left(mark)


@pytest.mark.long
@pytest.mark.parametrize("reader", ["head -n 3 >/dev/null", "grep -m 1 ready"])
def test_up_ends_with_141_when_its_reader_ends(open_terminal: OpenTerminal, mark: str, reader: str) -> None:
    up = open_terminal(*shell(reader))
    assert up.wait() == Exit.BROKEN_PIPE
    until_nothing_is_left(mark)


@pytest.mark.long
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_closed_terminal_ends_up_with_129(open_terminal: OpenTerminal, mark: str, moment: str) -> None:
    up = open_terminal(*celery_command(*UP))
    up.wait_for(moment)
    up.close()
    assert up.wait() == Exit.HANGUP
    until_nothing_is_left(mark)


@pytest.mark.long
def test_ctrl_c_is_followed_by_a_closed_terminal(open_terminal: OpenTerminal, mark: str) -> None:
    up = open_terminal(*celery_command(*UP))
    up.wait_for("Ctrl-C ends")
    up.press_ctrl_c()
    up.wait_for("Ending.")
    up.close()
    assert up.wait() == Exit.OK
    until_nothing_is_left(mark)


@pytest.mark.long
def test_up_survives_its_terminal_with_nohup(platform: Platform, open_terminal: OpenTerminal, mark: str) -> None:
    log = platform.folder / "up.log"
    line = f'trap "" HUP; exec "$0" -P -m celery -A platform {" ".join(UP)} >{log} 2>&1'
    up = open_terminal("/bin/sh", "-c", line, sys.executable)
    until(lambda: log.exists() and "Ctrl-C ends" in log.read_text(), "what runs, in the log")
    up.close()
    with pytest.raises(subprocess.TimeoutExpired):
        up.process.wait(2.0)
    os.kill(up.process.pid, signal.SIGTERM)
    assert up.wait() == Exit.OK
    until_nothing_is_left(mark)


@pytest.mark.long
def test_facts_that_nobody_reads_end_up_with_141(platform: Platform, mark: str) -> None:
    variables = {**platform.environment, "PLATFORM_DASHBOARD": "127.0.0.1:0", "TEST_MARK": mark}
    reading, writing = os.pipe()
    os.close(reading)
    process = subprocess.Popen(
        celery_command(*UP, "--json"), env=variables, cwd=platform.folder, stdout=writing, stderr=subprocess.DEVNULL
    )
    os.close(writing)
    assert process.wait(240) == Exit.BROKEN_PIPE
    until_nothing_is_left(mark)
