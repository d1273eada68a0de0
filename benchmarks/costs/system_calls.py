"""The system calls of processes, counted by perf where the kernel lets it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

#: The tracepoint at the entry of each system call.
EVENT = "raw_syscalls:sys_enter"

#: Seconds for perf to attach and to end.
PATIENCE = 10.0


def can_count() -> bool:
    """Return True if perf is installed and may count the system calls of a process here."""
    if shutil.which("perf") is None:
        return False
    tried = subprocess.run(
        ["perf", "stat", "-x", ",", "-e", EVENT, "true"], capture_output=True, text=True, check=False, timeout=PATIENCE
    )
    return _total(tried.stderr) is not None


@contextmanager
def counted(processes: Mapping[str, Sequence[int]]) -> Iterator[dict[str, int]]:
    """Count the system calls of processes by role while the block runs. The counts are there after the block."""
    counts: dict[str, int] = {}
    with ExitStack() as stack:
        running = {role: stack.enter_context(_attached(pids)) for role, pids in processes.items()}
        yield counts
        for perf in running.values():
            perf.send_signal(signal.SIGINT)
        for role, perf in running.items():
            _, errors = perf.communicate(timeout=PATIENCE)
            counts[role] = _total(errors) or 0


@contextmanager
def _attached(pids: Sequence[int]) -> Iterator[subprocess.Popen[str]]:
    """Run perf on processes, counting from the entry of the block on. End it if the block did not."""
    command = ["perf", "stat", "-x", ",", "-e", EVENT, "-p", ",".join(map(str, pids))]
    control, enable = os.pipe()
    answer, answered = os.pipe()
    # perf starts without counting, and says on the second pipe that it began.
    command += ["--delay=-1", f"--control=fd:{control},{answered}"]
    perf = subprocess.Popen(
        command, pass_fds=[control, answered], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        os.close(control)
        os.close(answered)
        os.write(enable, b"enable\n")
        os.read(answer, 16)
        yield perf
    finally:
        os.close(enable)
        os.close(answer)
        if perf.poll() is None:
            perf.kill()
            perf.wait()


def _total(output: str) -> int | None:
    """Return the count in the output of `perf stat -x ,`, or None if there is none.

    >>> _total("109,,raw_syscalls:sys_enter,871672,100.00,,")
    109
    """
    for line in output.splitlines():
        count, _, rest = line.partition(",")
        if EVENT in rest and count.isdecimal():
            return int(count)
    return None
