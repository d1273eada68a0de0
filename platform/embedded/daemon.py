"""Processes that outlive the command that starts them: started apart from it, known by pid and start time,
ended by signal."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from celery_capacity.routing.config import process_identity
from celery_capacity.routing.errors import NoServers

__all__ = ["Detached", "Owner", "start", "tail", "until", "wait"]

#: Seconds between two looks at a process that starts or ends; it is not our child, so nothing tells us.
LOOK = 0.01

#: Lines of a log shown in an error.
SHOWN_LINES = 12

# The shell ends at once, so the server becomes init's child: no zombie stays when it ends before us, and
# Ctrl-C in our terminal does not reach it (the session is new).
_DETACH = '"$@" </dev/null >>"$DETACHED_LOG" 2>&1 & echo $!'


@dataclass(frozen=True)
class Owner:
    """The system user that a process runs as, where that is not the caller."""

    name: str
    uid: int
    gid: int


@dataclass(frozen=True)
class Detached:
    """A process of this machine by its pid and the clock ticks from the boot to its start: pids are used again, the
    two together are not. (`ticks` is None where there is no `/proc`.)"""

    pid: int
    ticks: int | None

    @classmethod
    def of(cls, pid: int) -> Detached | None:
        """The live process with this pid. A zombie, which has ended and only waits to be reaped, is not
        one."""
        found = cls(pid, process_identity.start_ticks(pid))
        return found if found.alive() else None

    def alive(self) -> bool:
        return not process_identity.is_over(self.pid, self.ticks)

    def mentions(self, path: Path) -> bool:
        """Whether the process's command line has this path as an argument: how a server is told from a reused
        pid."""
        try:
            return str(path) in psutil.Process(self.pid).cmdline()
        except psutil.Error:
            return False

    def end(self, *steps: tuple[signal.Signals, float]) -> bool:
        """Sends each signal in turn and waits its seconds for the process to go; False if it is still
        there."""
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


def start(arguments: Sequence[str | Path], log: Path, owner: Owner | None = None) -> Detached:
    """Starts a program apart from this process, its output appended to `log`.

    Raises NoServers with the end of the log when it is gone at once.
    """
    try:
        done = subprocess.run(
            ["/bin/sh", "-c", _DETACH, "sh", *map(str, arguments)],
            env={**environment(), "DETACHED_LOG": str(log)},
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
        raise NoServers(f"{arguments[0]} cannot be started: {error}") from error
    process = Detached.of(int(done.stdout))
    if process is None:
        raise NoServers(f"{Path(arguments[0]).name} ended at once. The end of {log}:\n{tail(log)}")
    return process


def wait(process: Detached, ready: Callable[[], bool], seconds: float, log: Path) -> None:
    """Returns when `ready()` holds. Raises NoServers, with the end of the log, when the process ends or the
    time does."""
    until(lambda: not process.alive() or ready(), seconds)
    if not process.alive():
        raise NoServers(f"the server ended while it started. The end of {log}:\n{tail(log)}")
    if not ready():
        raise NoServers(f"the server was not ready within {seconds:g} s. The end of {log}:\n{tail(log)}")


def until(condition: Callable[[], bool], seconds: float) -> bool:
    """Waits for a condition outside this process; False if the time ended first."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(LOOK)
    return True


def tail(log: Path) -> str:
    """The last lines of a log, for an error."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        return f"(not readable: {error.strerror})"
    return "\n".join(lines[-SHOWN_LINES:]) or "(empty)"


def environment() -> Mapping[str, str]:
    """Ours, less what would change a server's or a client tool's mind (the caller's PG... variables and locale), and
    less what says that a worker's body started it: servers outlive that worker."""
    foreign = ("PG", "LC_", "LANG", "CELERY_CAPACITY_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return {**kept, "LC_ALL": "C"}
