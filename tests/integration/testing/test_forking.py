"""A process that is forked for the tests equals a process that a person starts, in all that it can tell of itself."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.fixtures.processes import forking
from tests.fixtures.processes.platforms import Process

#: Module of `-A`: it prints facts about its process, and ends as the environment demands.
APP = """
import json, os, signal, sys, threading
main = sys.modules["__main__"]
print(json.dumps({
    "argv": sys.argv, "path": sys.path, "folder": os.getcwd(), "flags": str(sys.flags), "environ": dict(os.environ),
    "main": [main.__name__, main.__package__, main.__file__, main.__spec__.name],
    "streams": [[s.name, s.mode, s.encoding, s.errors, s.line_buffering, s.write_through, s.isatty()]
                for s in (sys.stdin, sys.stdout, sys.stderr)],
    "leads": [os.getpgrp() == os.getpid(), os.getsid(0) == os.getpid()],
    "descriptors": sorted(name for name in os.listdir("/dev/fd") if os.path.exists(f"/dev/fd/{name}")),
    "signals": [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)],
    "blocked": list(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    "threads": threading.active_count(), "hook": sys.excepthook.__module__, "umask": os.umask(0o22),
}, sort_keys=True))
print("to standard error", file=sys.stderr)
exec(os.environ["PLATFORM_END"])
"""
ENDS = {
    "exit": "sys.exit(3)",
    "handlers": "import atexit; atexit.register(print, 'handler'); threading.Timer(0.1, print, ['thread']).start();"
    " sys.exit(3)",
    "message": "sys.exit('gone')",
    "error": "raise GeneratorExit('gone')",
    "signal": "os.kill(os.getpid(), 9)",
}
CODES = {"exit": 3, "handlers": 3, "message": 1, "error": 1, "signal": -signal.SIGKILL}
COMMAND = [*forking.CELERY, "-A", "said", "report"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tmp_path.joinpath("said.py").write_text(APP)
    return tmp_path


def said(folder: Path, end: str, *, forks: bool) -> tuple[int, list[str]]:
    variables = {**forking.usual_environment(), "PLATFORM_END": ENDS[end]}
    assert forking.can_fork(COMMAND, variables)
    process = Process("said", COMMAND, variables, folder, forks=forks)
    assert isinstance(process.process, forking.Forked) == forks
    # The middle of a traceback is left out, since the two processes began in different places.
    return process.finish(60), [line for line in process.lines if not line.startswith(" ")]


@pytest.mark.parametrize("end", ENDS)
def test_a_forked_process_is_what_a_started_one_is(folder: Path, end: str) -> None:
    code, lines = said(folder, end, forks=True)
    assert code == CODES[end]
    assert (code, lines) == said(folder, end, forks=False)
    assert ("GeneratorExit: gone" in lines) == (end == "error")
    assert (lines[-2:] == ["thread", "handler"]) == (end == "handlers")


def test_what_it_says_is_read_apart_and_it_is_not_waited_for_for_ever(folder: Path) -> None:
    variables = {**forking.usual_environment(), "PLATFORM_END": ENDS["exit"]}
    done = forking.run(COMMAND, variables, folder, 60)
    assert (done.returncode, done.stderr) == (3, "to standard error\n")
    assert done.stdout.startswith('{"argv"')
    with pytest.raises(forking.TimeoutExpired):
        forking.run(COMMAND, {**variables, "PLATFORM_END": "signal.pause()"}, folder, 1)


def test_only_what_is_read_late_may_differ(folder: Path) -> None:
    usual = forking.usual_environment()
    assert forking.can_fork(COMMAND, {**usual, "REDIS_URL": "redis://elsewhere", "PLATFORM_CPUS": "3"})
    for other in ({"PYTHONHASHSEED": "1"}, {"LC_ALL": "C"}, {"CELERY_TRACE_APP": "1"}, {"C_FORCE_ROOT": "1"}):
        assert not forking.can_fork(COMMAND, {**usual, **other})
    assert not forking.can_fork(COMMAND, {name: value for name, value in usual.items() if name != "PATH"})
    assert not forking.can_fork(["/usr/bin/celery", "-A", "said", "report"], usual)
