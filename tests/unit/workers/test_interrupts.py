"""Ctrl-C while a command imports what it needs."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from celery_capacity.workers import interrupts
from celery_capacity.workers.process.exit_codes import Exit
from tests.fixtures.processes.forking import usual_environment

#: A module that presses Ctrl-C when it is imported, and stays in its import.
PRESSED = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"
SCRIPT = str(Path(sys.executable).with_name("capacity"))


def end_of(*command: str, **variables: str) -> tuple[int, str, str]:
    """Return the exit code and the output of a program."""
    done = subprocess.run(
        command, env={**usual_environment(), **variables}, capture_output=True, text=True, check=False, timeout=120
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["-A", "platform", "up"], "up"),
        (["--workdir", "jobs", "-C", "cluster", "--json"], "cluster"),
        (["--app=demo", "jobs"], "jobs"),
        (["--help"], None),
        (["-A"], None),
    ],
)
def test_command_is_read_from_the_words(words: list[str], command: str | None) -> None:
    assert interrupts.command_of(words) == command


@pytest.mark.parametrize("module", ["click", "redis"])
def test_ctrl_c_in_imports_of_the_script_ends_up(tmp_path: Path, module: str) -> None:
    (tmp_path / f"{module}.py").write_text(PRESSED)
    ended = end_of(SCRIPT, "up", PYTHONPATH=str(tmp_path))
    assert ended == (Exit.INTERRUPTED, "", "Interrupted.\n")


@pytest.mark.parametrize("words", [["jobs"], ["--help"], ["-A", "proj", "worker"]])
def test_ctrl_c_in_imports_of_the_script_is_silent(tmp_path: Path, words: list[str]) -> None:
    (tmp_path / "click.py").write_text(PRESSED)
    assert end_of(SCRIPT, *words, PYTHONPATH=str(tmp_path)) == (-signal.SIGINT, "", "")


@pytest.mark.parametrize(
    ("command", "code", "text"), [("up", Exit.INTERRUPTED, "Interrupted.\n"), ("jobs", -signal.SIGINT, "")]
)
def test_ctrl_c_after_imports_of_celery_shows_no_traceback(command: str, code: int, text: str) -> None:
    # The plugin is what Celery imports first of the project. The command itself comes later.
    lines = (
        "import os, signal, sys",
        f"sys.argv = ['celery', '-A', 'platform', '{command}']",
        "import celery_capacity.workers.plugin",
        "os.kill(os.getpid(), signal.SIGINT)",
    )
    assert end_of(sys.executable, "-c", "\n".join(lines)) == (code, "", text)


@pytest.mark.parametrize("program", ["manage.py", "/srv/etl/__main__.py"])
def test_another_program_keeps_its_way_with_ctrl_c(program: str) -> None:
    lines = (
        "import signal, sys",
        f"sys.argv = ['{program}', 'jobs']",
        "import celery_capacity.workers.plugin",
        "print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)",
    )
    assert end_of(sys.executable, "-c", "\n".join(lines)) == (0, "True\n", "")


def test_ignored_ctrl_c_stays_ignored(tmp_path: Path) -> None:
    # As a shell starts a program in the background.
    (tmp_path / "click.py").write_text(PRESSED.replace("time.sleep(60)", "print('ignored'); os._exit(0)"))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert end_of(SCRIPT, "up", PYTHONPATH=str(tmp_path)) == (0, "ignored\n", "")
    finally:
        signal.signal(signal.SIGINT, before)


def test_celerys_command_gets_python_s_handler(tmp_path: Path) -> None:
    (tmp_path / "proj.py").write_text(
        "import os, signal\nfrom celery import Celery\napp = Celery('proj')\n"
        "print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)\nos._exit(0)\n"
    )
    assert end_of(SCRIPT, "--workdir", str(tmp_path), "-A", "proj", "report")[0:2] == (0, "True\n")
