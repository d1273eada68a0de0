"""Identity of the process that a pid means, so that it can be told whether that process is over.

A pid alone means little: it is used again, and counts in one namespace of one boot of one kernel. A process is known by
its *pid space* (that boot and namespace) and by the tick of the kernel's monotonic clock at which it started. The host
name and the wall clock prove nothing: cloned machines share a host name, and anybody may set the clock.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import psutil

#: Files that name the machine, as systemd and D-Bus keep it. Containers often have none, and clones share them.
MACHINE_ID_FILES: Final = (Path("/etc/machine-id"), Path("/var/lib/dbus/machine-id"))
#: The kernel's random id of its boot, and a process's namespaces in which pids and clock ticks count.
BOOT_ID_FILE: Final = Path("/proc/sys/kernel/random/boot_id")
NAMESPACES: Final = (Path("/proc/self/ns/pid"), Path("/proc/self/ns/time"))
#: Seconds for macOS's `sysctl`, which names the boot there.
SYSCTL_TIMEOUT: Final = 5.0
#: Fields of `/proc/<pid>/stat` behind the command's name: the state, and the start in clock ticks since the boot.
STATE_FIELD: Final = 0
START_FIELD: Final = 19
#: States of a process that has ended and that no parent has waited for.
ENDED_STATES: Final = ("Z", "X", "x")


@dataclass(frozen=True, slots=True)
class PidSpace:
    """Space in which a pid counts. `machine` is a digest, which clones share; `boot` is random, "" where unknown."""

    machine: str
    boot: str

    def has(self, other: PidSpace) -> bool:
        """Return True only if the pids of that space are certainly those of this one."""
        return bool(self.boot) and self == other


def pid_space() -> PidSpace:
    """Return the pid space of this process."""
    return PidSpace(machine_id(), boot_id())


def machine_id() -> str:
    """Return a digest of this machine's id, "" where it has none.

    The id itself is not to leave its machine.
    """
    for path in MACHINE_ID_FILES:
        try:
            text = path.read_text().strip()
        except OSError:
            continue
        if text:
            return hashlib.blake2b(text.encode(), digest_size=16, person=b"celery-capacity").hexdigest()
    return ""


def boot_id() -> str:
    """Return the id of this boot, a colon, and the namespaces in which this process counts pids and ticks.

    Return "" where that cannot be told: then nothing is known of any other process.
    """
    if not BOOT_ID_FILE.exists():
        return _boot_session()
    # A /proc of another namespace has pids that are not those of this process.
    if os.readlink("/proc/self") != str(os.getpid()):
        return ""
    spaces = [path.readlink().name for path in NAMESPACES if path.is_symlink()]
    return f"{BOOT_ID_FILE.read_text().strip()}:{','.join(spaces)}"


@cache
def _boot_session() -> str:
    """Return the id of the boot on macOS, "" on other systems without `/proc`."""
    command = ["/usr/sbin/sysctl", "-n", "kern.bootsessionuuid"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SYSCTL_TIMEOUT, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return f"{done.stdout.strip()}:"


def start_ticks(pid: int) -> int | None:
    """Return the clock ticks from the boot to the start of a process, None where that cannot be read."""
    fields = _stat(pid)
    return None if fields is None else int(fields[START_FIELD])


def is_over(pid: int, ticks: int | None) -> bool:
    """Return True only if no process of this pid space has that pid and start. A stopped process is not over.

    Without `ticks`, only a pid without a process, or of a zombie, proves it.
    """
    if pid <= 0:
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # it belongs to somebody else
    except OverflowError:
        return True  # no pid is so large
    fields = _stat(pid)
    if fields is None:
        return _is_zombie(pid)
    return fields[STATE_FIELD] in ENDED_STATES or (ticks is not None and int(fields[START_FIELD]) != ticks)


def is_alive(pid: int, ticks: int | None) -> bool:
    """Return True only if a process of this pid space has that pid and start, and has not ended."""
    fields = _stat(pid)
    return fields is not None and fields[STATE_FIELD] not in ENDED_STATES and int(fields[START_FIELD]) == ticks


def _stat(pid: int) -> list[str] | None:
    """Return the fields of `/proc/<pid>/stat` from the state on, None where they cannot be read."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    # The command's name may have spaces and brackets.
    return text.rpartition(")")[2].split()


def _is_zombie(pid: int) -> bool:
    """Return True if the process has ended, where there is no `/proc`."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        # The kernel may hide processes of other users; the signal has shown that there is one.
        return False
    except psutil.Error:
        return False
