"""Child processes of a command: start them, read their output, notice their end, end them in order.

A `Supervisor` puts all events into one queue, each as a `ProcessEvent`: a child is ready, a child ended, this process
got a signal. The command waits in `next`, so that nothing is polled and nothing is missed. Each child leads a process
group of its own. So Ctrl-C reaches this process alone, which then ends the children in its own order, and the final
kill also reaches the processes that a child forked.
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
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import TypeVar

from celery_capacity.workers.logs import json_lines

T = TypeVar("T")

#: End of the line that Celery's worker logs, at INFO, when it can be admitted to.
READY = " ready."

#: Lines of a child that are kept, to be shown when it dies.
KEPT_LINES = 40

#: Seconds between two calls of `meanwhile`, while children end.
LOOK = 0.1

#: Seconds that a killed process may take to disappear: it only has to leave the kernel.
KILL_PATIENCE = 10.0

#: Seconds in which a repeated signal is a duplicate: `timeout` signals a process and then its group.
SAME_SIGNAL = 0.3

#: Seconds after which an unhandled signal means that the command is stuck, so that the next signal breaks it.
UNHEARD = 2.0

# Ends the children of a command that was itself killed: the pipe to this script closes then. The script reads the
# children's pids, one per line, and "done" when the command has ended them itself. Pids are reused, so the script
# checks the command line of each process. $1 is the line's beginning; Celery renames its processes where setproctitle
# is installed.
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
    """A way to ask a child to end: a signal, and the seconds to wait for the end. None waits without limit."""

    signum: int
    patience: float | None


#: Celery's warm shutdown: running jobs come to their end. Only a second signal to this process hurries it.
WARM = Step(signal.SIGTERM, None)
#: Celery's cold shutdown: running jobs are broken off and handed back.
COLD = Step(signal.SIGQUIT, 10.0)


def celery_command(*arguments: str) -> list[str]:
    """Return the command line of `celery -A platform …` under this very interpreter, whatever PATH says.

    With -P the working folder does not come before the installed packages, as with the `celery` script.
    """
    return [sys.executable, "-P", "-m", "celery", "-A", "platform", *arguments]


def script_command(*arguments: str) -> list[str]:
    """Return the command line of `capacity …` under this very interpreter, for a child that needs no Celery."""
    return [sys.executable, "-P", "-m", "celery_capacity.platform.script", *arguments]


@dataclass
class Child:
    """A started process. `code` is None until its end is seen, and negative for the signal that ended it."""

    name: str
    process: subprocess.Popen[bytes]
    last_lines: deque[str] = field(default_factory=lambda: deque(maxlen=KEPT_LINES))
    ready: bool = False
    ready_line: str = ""
    code: int | None = None
    #: Monotonic time of its start.
    since: float = field(default_factory=time.monotonic)

    @property
    def pid(self) -> int:
        return self.process.pid


@dataclass(frozen=True)
class ProcessEvent:
    """An event: `what` is "ready" or "ended" of a child, "signal" to this process, "done" of work beside it, or "lost".

    Lost is the reader of this process's output, and `signum` the signal that other programs would get for it.
    """

    what: str
    child: Child | None = None
    signum: int = 0


def ignored(signum: signal.Signals) -> bool:
    """Return True if the process that started this one has it ignore the signal."""
    return signal.getsignal(signum) == signal.SIG_IGN


def died(child: Child) -> str:
    """Describe in words how a child ended."""
    if child.code is None:
        return f"{child.name} is running"
    if child.code >= 0:
        return f"{child.name} ended with exit code {child.code}"
    try:
        name = signal.Signals(-child.code).name
    except ValueError:
        name = f"signal {-child.code}"
    return f"{child.name} was ended by {name}"


class Supervisor:
    """The children of one command. One thread calls `start`, `next`, `end` and `close`.

    `orphans` is the signal to the children when this process is killed. TERM lets running jobs come to their end.
    """

    def __init__(
        self, on_line: Callable[[Child, str], None] | None = None, orphans: signal.Signals = signal.SIGTERM
    ) -> None:
        self._on_line = on_line
        self._orphans = orphans
        self._guard: subprocess.Popen[bytes] | None = None
        #: A SimpleQueue, because its put is reentrant: a signal handler may call it wherever it interrupts.
        self._events: queue.SimpleQueue[ProcessEvent] = queue.SimpleQueue()
        self._readers: dict[int, threading.Thread] = {}
        self._unheard: float | None = None
        #: Times of the newest signal, as the thread heard it and as the handler had it.
        self._last_heard = self._last_signal = -SAME_SIGNAL
        self.children: list[Child] = []

    def start(
        self,
        name: str,
        command: Sequence[str],
        environ: Mapping[str, str],
        ready: str = READY,
        keep_open: Sequence[int] = (),
    ) -> Child:
        """Start a child. It is ready when one of its lines, or of their messages in JSON, ends with `ready`.

        With "" it is ready at once.
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
            with suppress(BrokenPipeError):  # the guard was ended by somebody; it is only a help
                self._guard.stdin.write(f"{line}\n".encode())
                self._guard.stdin.flush()

    def close(self) -> None:
        """Dismiss the guard if all children have ended. Otherwise, after an error, the guard ends them."""
        if self._guard is not None:
            if not self.running():
                self._to_guard("done")
            self._guard.communicate()
            self._guard = None

    def _read(self, child: Child, ready: str) -> None:
        assert child.process.stdout is not None
        with child.process.stdout as pipe:
            for raw in pipe:
                line = raw.decode("utf-8", "replace").rstrip()
                child.last_lines.append(line)
                if self._on_line is not None:
                    self._on_line(child, line)
                message = line if child.ready else json_lines.message_of(line) or line
                if not child.ready and message.endswith(ready):
                    child.ready_line = message
                    child.ready = True
                    self._events.put(ProcessEvent("ready", child))

    def _reap(self, child: Child) -> None:
        code = child.process.wait()
        # The child's last lines come before the news of its end. Processes that it forked may keep the pipe open; do
        # not wait for them.
        self._readers[child.pid].join(1.0)
        child.code = code
        self._events.put(ProcessEvent("ended", child))

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Turn signals that mean "end" into events, so that none breaks an orderly end. Main thread only.

        If nobody looks, because a store that does not answer holds the command, the next signal is a KeyboardInterrupt.
        """
        # A closed terminal does not concern a command that was started by `nohup`.
        heard = [signum for signum in ENDING if not (signum == signal.SIGHUP and ignored(signum))]
        before = {signum: signal.signal(signum, self._on_signal) for signum in heard}
        try:
            with self._hearing(frozenset(heard)):
                yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    @contextmanager
    def _hearing(self, heard: Collection[int]) -> Iterator[None]:
        """Put an event into the queue at each of these signals, from a thread.

        Python runs handlers in the main thread between two instructions. A signal that comes just before that thread
        blocks in the queue would have to wait for the next event: nobody would hear a Ctrl-C. The byte of a signal is
        in the pipe before its handler runs, and whether or not it runs soon.
        """
        reading, writing = os.pipe()
        os.set_blocking(writing, False)

        def hear() -> None:
            while signums := os.read(reading, 64):
                for signum in signums:
                    if signum in heard:
                        self._hear(signum)

        thread = threading.Thread(target=hear, name="signals", daemon=True)
        thread.start()
        before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            os.close(writing)
            thread.join()
            os.close(reading)

    def _hear(self, signum: int) -> None:
        now = time.monotonic()
        repeated = now - self._last_heard < SAME_SIGNAL
        self._last_heard = now
        if not repeated:
            self._unheard = self._unheard or now
            self._events.put(ProcessEvent("signal", signum=signum))

    def _on_signal(self, _signum: int, _frame: FrameType | None) -> None:
        """Break a command that is stuck: it took no event since an earlier signal."""
        now = time.monotonic()
        repeated = now - self._last_signal < SAME_SIGNAL
        self._last_signal = now
        if not repeated and self._unheard is not None and now - self._unheard > UNHEARD:
            raise KeyboardInterrupt

    def lost(self, signum: int) -> None:
        """Note that nobody reads this process's output any more. From any thread."""
        self._events.put(ProcessEvent("lost", signum=signum))

    def next(self, timeout: float | None = None) -> ProcessEvent | None:
        """Return the next event, or None after `timeout` seconds. Without a timeout, wait for ever."""
        try:
            event = self._events.get(timeout=timeout)
        except queue.Empty:
            return None
        if event.what == "signal":
            self._unheard = None
        return event

    def beside(self, work: Callable[[], T], name: str) -> Future[T]:
        """Start work in a thread, and return its future result. Its end is the event "done"."""
        future = Future[T]()

        def run() -> None:
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)
            finally:
                self._events.put(ProcessEvent("done"))

        threading.Thread(target=run, name=name, daemon=True).start()
        return future

    def running(self) -> list[Child]:
        """Return the children whose end was not seen."""
        return [child for child in self.children if child.code is None]

    def end(
        self,
        children: Sequence[Child],
        steps: Sequence[Step],
        meanwhile: Callable[[float], None] | None = None,
    ) -> None:
        """End these children: apply one step after the other, then kill the rest. Return when all have ended.

        Another Ctrl-C or TERM to this process in the meantime starts the next step at once. A terminal that closes
        meanwhile does not: nobody asked for haste. `meanwhile` is called again and again with the seconds of a step
        without limit.
        """
        for step in steps:
            for child in children:
                if child.code is None:
                    child.process.send_signal(step.signum)
            if self._all_ended(children, step.patience, may_hurry=True, meanwhile=meanwhile):
                return
        for child in children:
            if child.code is None and child.process.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
        self._all_ended(children, KILL_PATIENCE, may_hurry=False)

    def _all_ended(
        self,
        children: Sequence[Child],
        patience: float | None,
        may_hurry: bool,
        meanwhile: Callable[[float], None] | None = None,
    ) -> bool:
        since = time.monotonic()
        deadline = None if patience is None else since + patience
        while any(child.code is None for child in children):
            if deadline is None and meanwhile is not None:
                event = self.next(LOOK)
                if event is None:
                    meanwhile(time.monotonic() - since)
                    continue
            else:
                event = self.next(None if deadline is None else deadline - time.monotonic())
            if event is None or (event.what == "signal" and event.signum != signal.SIGHUP and may_hurry):
                return all(child.code is not None for child in children)
        return True
