"""Processes that outlive the command that starts them.

Each one is started apart from the command, identified by pid and start time, and ended by signal.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from celery_capacity.platform.embedded.starting import CannotStart, Start
from celery_capacity.routing.config import process_identity

#: Seconds between two looks at a process that starts or ends. It is not our child, so the system sends no notice.
LOOK = 0.01

#: Lines of a log that an error shows.
SHOWN_LINES = 12

# The shell ends at once, so that the server becomes init's child. No zombie stays when the server ends before us. The
# session is new, so that Ctrl-C in our terminal does not reach the server.
_DETACH = '"$@" </dev/null >>"$DETACHED_LOG" 2>&1 & echo $!'


@dataclass(frozen=True)
class Owner:
    """The system user of a process that does not run as the caller."""

    name: str
    uid: int
    gid: int


@dataclass(frozen=True)
class Daemon:
    """A process of this machine, identified by its pid and by the clock ticks from the boot to its start.

    Pids are reused, but a pid together with its ticks is unique. `ticks` is None where there is no `/proc`.
    """

    pid: int
    ticks: int | None

    @classmethod
    def of(cls, pid: int) -> Daemon | None:
        """Return the live process with this pid, or None.

        A zombie is not alive: it has ended and only waits to be reaped.
        """
        process = cls(pid, process_identity.start_ticks(pid))
        return process if process.alive() else None

    def alive(self) -> bool:
        return not process_identity.is_over(self.pid, self.ticks)

    def mentions(self, path: Path) -> bool:
        """Return True if the process's command line has this path as an argument.

        So a server is distinguished from another process that reuses its pid.
        """
        try:
            return str(path) in psutil.Process(self.pid).cmdline()
        except psutil.Error:
            return False

    def end(self, *steps: tuple[signal.Signals, float]) -> bool:
        """Send each signal in turn and wait its seconds for the process to end. Return False if it still lives."""
        for signum, seconds in steps:
            if not self.alive():
                return True
            try:
                os.kill(self.pid, signum)
            except ProcessLookupError:
                return True
            if until(lambda: not self.alive(), seconds):
                return True
        return not self.alive()


def start(
    arguments: Sequence[str | Path], log: Path, owner: Owner | None = None, variables: Mapping[str, str] | None = None
) -> Daemon:
    """Start a program apart from this process, and append its output to `log`.

    It gets `variables` where this process has none of that name. Raises CannotStart with the end of the log if the
    program ends at once.
    """
    try:
        done = subprocess.run(
            ["/bin/sh", "-c", _DETACH, "sh", *map(str, arguments)],
            env={**(variables or {}), **environment(), "DETACHED_LOG": str(log)},
            cwd="/",
            stdout=subprocess.PIPE,
            start_new_session=True,
            umask=0o077,
            check=True,
            user=None if owner is None else owner.uid,
            group=None if owner is None else owner.gid,
            extra_groups=None if owner is None else [],
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise CannotStart(f"{arguments[0]} cannot be started: {error}") from error
    process = Daemon.of(int(done.stdout))
    if process is None:
        raise CannotStart(f"{Path(arguments[0]).name} ended at once. The end of {log}:\n{tail(log)}")
    return process


def wait(process: Daemon, ready: Callable[[], bool], seconds: float, log: Path, beginning: Start | None = None) -> None:
    """Return when `ready()` is true.

    Raises CannotStart, with the end of the log, when the process ends or the time runs out, and CalledOff.
    """
    until(lambda: not process.alive() or ready(), seconds, beginning)
    if not process.alive():
        raise CannotStart(f"the server ended while it started. The end of {log}:\n{tail(log)}")
    if not ready():
        raise CannotStart(f"the server was not ready within {seconds:g} s. The end of {log}:\n{tail(log)}")


def until(condition: Callable[[], bool], seconds: float, beginning: Start | None = None) -> bool:
    """Wait for a condition outside this process. Return False if the time runs out first. Raise CalledOff."""
    end = time.monotonic() + seconds
    while not condition():
        if beginning is not None:
            beginning.check()
        if time.monotonic() > end:
            return False
        time.sleep(LOOK)
    return True


def tail(log: Path) -> str:
    """Return the last lines of a log, for an error."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        return f"(not readable: {error.strerror})"
    return "\n".join(lines[-SHOWN_LINES:]) or "(empty)"


def environment() -> Mapping[str, str]:
    """Return this process's environment without the variables that would change a server or a client tool.

    The PG... variables and the locale of the caller are removed. So are the variables that say that the body of a
    worker started the server, because servers outlive that worker.
    """
    foreign = ("PG", "LC_", "LANG", "CELERY_CAPACITY_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return {**kept, "LC_ALL": "C"}
