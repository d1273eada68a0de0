"""Child processes of a command: start them, read what they say, notice their end, end them in order.

A `Family` puts everything that happens to it into one queue as a `Happening`: a child is ready, a child
ended, this process got a signal. The command waits in `next`, so nothing is polled and nothing is missed.
Each child leads a process group of its own: Ctrl-C reaches this process alone, which then ends the children
in its own order, and the last resort reaches what a child forked.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import TextIO

__all__ = ["COLD", "WARM", "Child", "Family", "Happening", "Step", "celery_command", "died", "prefixed"]

#: How the line ends that Celery's worker logs (at INFO) when it can be admitted to.
READY = " ready."

#: Lines of a child that are kept, to be shown when it dies.
KEPT_LINES = 40

#: Seconds that a killed process may take to be gone: it only has to leave the kernel.
KILL_PATIENCE = 10.0

#: Seconds in which a repeated signal counts as the same one: `timeout` signals a process and then its group.
SAME_SIGNAL = 0.3

#: Seconds after which a signal that nobody looked at tells that the command is stuck, so that the next one
#: breaks it.
UNHEARD = 2.0

# Ends what a command leaves behind that was itself killed: the pipe to it closes then. It reads the children's
# pids, a line each, and "done" when the command has ended them itself. Pids are used again, so it asks whose
# command line that is ($1 is its beginning; Celery renames its processes where setproctitle is installed).
_GUARD = """
mine() { { tr '\\0' ' ' </proc/"$1"/cmdline || ps -p "$1" -o command=; } 2>/dev/null | grep -qF -e "$2" -e celeryd; }
pids=
while read -r pid; do [ "$pid" = done ] && exit; pids="$pids $pid"; done
for pid in $pids; do mine "$pid" "$1" && kill -s "$2" "$pid"; done
"""

#: Signals that mean "end": Ctrl-C, `kill`, and a closed terminal.
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Step:
    """One way of asking a child to end, and the seconds to wait for it (None: until it has)."""

    signum: int
    patience: float | None


#: Celery's warm shutdown: what runs comes to its end. Never hurried by us, only by a second signal to us.
WARM = Step(signal.SIGTERM, None)
#: Celery's cold shutdown: what runs is broken off and handed back.
COLD = Step(signal.SIGQUIT, 10.0)


def celery_command(*arguments: str) -> list[str]:
    """The command line of `celery -A platform …` under this very interpreter, whatever PATH says.

    With -P the working folder does not come before the installed packages, as with the `celery` script.
    """
    return [sys.executable, "-P", "-m", "celery", "-A", "platform", *arguments]


@dataclass
class Child:
    """One started process. `code` is None until it was seen to end, negative for the signal that ended it."""

    name: str
    process: subprocess.Popen[bytes]
    said: deque[str] = field(default_factory=lambda: deque(maxlen=KEPT_LINES))
    ready: bool = False
    ready_line: str = ""
    code: int | None = None

    @property
    def pid(self) -> int:
        return self.process.pid


@dataclass(frozen=True)
class Happening:
    """`what` is "ready", "ended" (both of a child) or "signal" (to this process)."""

    what: str
    child: Child | None = None
    signum: int = 0


def died(child: Child) -> str:
    """How a child ended, in words."""
    if child.code is None:
        return f"{child.name} is running"
    if child.code >= 0:
        return f"{child.name} ended with exit code {child.code}"
    try:
        name = signal.Signals(-child.code).name
    except ValueError:
        name = f"signal {-child.code}"
    return f"{child.name} was ended by {name}"


def prefixed(stream: TextIO) -> Callable[[Child, str], None]:
    """Print what children say with their names in front, each line in one write, from any thread."""
    lock = threading.Lock()

    def write(child: Child, line: str) -> None:
        with lock:
            try:
                stream.write(f"[{child.name}] {line}\n")
                stream.flush()
            except (OSError, ValueError):
                # Nobody reads any more (`| head`), or the stream is closed. The child's pipe must be emptied
                # all the same: a worker that cannot log stands still.
                return

    return write


class Family:
    """The children of one command. One thread calls `start`, `next`, `end` and `close`.

    `orphans` is what the children get when this process is killed: TERM lets running jobs come to their end.
    """

    def __init__(
        self, on_line: Callable[[Child, str], None] | None = None, orphans: signal.Signals = signal.SIGTERM
    ) -> None:
        self._on_line = on_line
        self._orphans = orphans
        self._guard: subprocess.Popen[bytes] | None = None
        #: SimpleQueue: its put is reentrant, so a signal handler may call it wherever it interrupts.
        self._happenings: queue.SimpleQueue[Happening] = queue.SimpleQueue()
        self._readers: dict[int, threading.Thread] = {}
        self._unheard: float | None = None
        self._last_signal = -SAME_SIGNAL
        self.children: list[Child] = []

    def start(
        self,
        name: str,
        command: Sequence[str],
        environ: Mapping[str, str],
        ready: str = READY,
        keep_open: Sequence[int] = (),
    ) -> Child:
        """Start a child; it is ready when a line of it ends with `ready` ("": at once).

        `keep_open` are file descriptors that it inherits. Raises OSError if it cannot be started.
        """
        process = subprocess.Popen(
            command,
            env={**environ, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            process_group=0,
            pass_fds=keep_open,
        )
        child = Child(name, process, ready=not ready)
        self.children.append(child)
        self._guarded(child)
        reader = threading.Thread(target=self._read, args=(child, ready), name=f"read-{name}", daemon=True)
        self._readers[child.pid] = reader
        reader.start()
        threading.Thread(target=self._reap, args=(child,), name=f"reap-{name}", daemon=True).start()
        return child

    def _guarded(self, child: Child) -> None:
        if self._guard is None:
            self._guard = subprocess.Popen(
                ["/bin/sh", "-c", _GUARD, "sh", sys.executable, self._orphans.name.removeprefix("SIG")],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                start_new_session=True,
            )
        self._to_guard(str(child.pid))

    def _to_guard(self, line: str) -> None:
        if self._guard is not None and self._guard.stdin is not None:
            with suppress(BrokenPipeError):  # somebody ended the guard; it is a help, not a need
                self._guard.stdin.write(f"{line}\n".encode())
                self._guard.stdin.flush()

    def close(self) -> None:
        """All children have ended: nobody is to be guarded any more."""
        if self._guard is not None:
            self._to_guard("done")
            self._guard.communicate()
            self._guard = None

    def _read(self, child: Child, ready: str) -> None:
        assert child.process.stdout is not None
        with child.process.stdout as pipe:
            for raw in pipe:
                line = raw.decode("utf-8", "replace").rstrip()
                child.said.append(line)
                if self._on_line is not None:
                    self._on_line(child, line)
                if not child.ready and line.endswith(ready):
                    child.ready_line = line
                    child.ready = True
                    self._happenings.put(Happening("ready", child))

    def _reap(self, child: Child) -> None:
        code = child.process.wait()
        # Its last words come before the news of its end. What it forked may keep the pipe open: that is not
        # waited for.
        self._readers[child.pid].join(1.0)
        child.code = code
        self._happenings.put(Happening("ended", child))

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Signals that mean "end" become happenings, so that none breaks an orderly end. Main thread only.

        If nobody looks (a store that does not answer holds the command), the next one is a KeyboardInterrupt.
        """
        before = {signum: signal.signal(signum, self._on_signal) for signum in ENDING}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def _on_signal(self, signum: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        repeated = now - self._last_signal < SAME_SIGNAL
        self._last_signal = now
        if repeated:
            return
        if self._unheard is not None and now - self._unheard > UNHEARD:
            raise KeyboardInterrupt
        self._unheard = self._unheard or now
        self._happenings.put(Happening("signal", signum=signum))

    def next(self, timeout: float | None = None) -> Happening | None:
        """What happened next, or None after `timeout` seconds (None: wait for ever)."""
        try:
            happening = self._happenings.get(timeout=None if timeout is None else max(timeout, 0.0))
        except queue.Empty:
            return None
        if happening.what == "signal":
            self._unheard = None
        return happening

    def running(self) -> list[Child]:
        """The children that were not seen to end."""
        return [child for child in self.children if child.code is None]

    def end(self, children: Sequence[Child], steps: Sequence[Step]) -> None:
        """End these children: one step after the other, then kill what is left. Returns when all have ended.

        A signal to this process meanwhile (Ctrl-C again) goes on to the next step at once.
        """
        for step in steps:
            for child in children:
                if child.code is None:
                    child.process.send_signal(step.signum)
            if self._all_ended(children, step.patience, may_hurry=True):
                return
        for child in children:
            if child.code is None and child.process.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
        self._all_ended(children, KILL_PATIENCE, may_hurry=False)

    def _all_ended(self, children: Sequence[Child], patience: float | None, may_hurry: bool) -> bool:
        deadline = None if patience is None else time.monotonic() + patience
        while any(child.code is None for child in children):
            happening = self.next(None if deadline is None else deadline - time.monotonic())
            if happening is None or (happening.what == "signal" and may_hurry):
                return all(child.code is not None for child in children)
        return True
