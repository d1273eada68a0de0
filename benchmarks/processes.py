"""Worker and submitter processes of either side, and how to wait for them without polling."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

from benchmarks.servers import Pair
from benchmarks.tasks import READY_FD

Side = Literal["ours", "plain"]

SIDES: tuple[Side, Side] = ("ours", "plain")

#: Seconds for a worker to become ready, and to end on request.
START_PATIENCE, END_PATIENCE = 60.0, 30.0

#: The part of a `celery` command line that distinguishes the sides.
APPLICATION = {
    "ours": ["-A", "platform", "worker", "-I", "benchmarks.tasks"],
    "plain": ["-A", "benchmarks.plain", "worker"],
}


class ProcessFailed(RuntimeError):
    """A measured process ended or answered with an error. The message holds the end of its log."""


class Worker:
    """A worker process of a side, running when the constructor returns.

    `slots` has the number of slots of both sides, and the CPUs that ours publishes. `settings` are added to the
    environment.
    Raises ProcessFailed when the process ends, or is not ready within `START_PATIENCE`.
    """

    def __init__(
        self, side: Side, pair: Pair, pool: str, slots: tuple[int, int], name: str, settings: Mapping[str, str]
    ) -> None:
        concurrency, cpus = slots
        self.side = side
        self._log = pair.folder / f"{side}-{name}.log"
        command = [pair.python, "-m", "celery", *APPLICATION[side]]
        command += ["-P", pool, "-c", str(concurrency), "-n", f"{name}@{side}"]
        ready, announce = os.pipe()
        added = {"PLATFORM_CPUS": str(cpus), "NODE_NAME": name, READY_FD: str(announce), **settings}
        environment = pair.environment(**added)
        try:
            with self._log.open("ab") as log:
                self._process = subprocess.Popen(
                    command, cwd=pair.root, env=environment, pass_fds=[announce], stdout=log, stderr=log
                )
            os.close(announce)
            readable, _, _ = select.select([ready], [], [], START_PATIENCE)
            if not readable or os.read(ready, 1) != b"r":
                self.kill()
                raise ProcessFailed(f"the {side} worker {name} did not get ready:\n{self.log_tail()}")
        finally:
            os.close(ready)

    @property
    def pid(self) -> int:
        """Return the pid of the main process. The children of a prefork pool are its children."""
        return self._process.pid

    def pause(self) -> None:
        """Stop the process at its current point (SIGSTOP). Its connections and its lease stay."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Continue the process after `pause`."""
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """End the process at once."""
        self._process.kill()
        self._process.wait()

    def end(self) -> None:
        """Shut the worker down warm. Raise ProcessFailed if it does not end in `END_PATIENCE` seconds."""
        if self._process.poll() is None:
            self.resume()
            self._process.terminate()
        try:
            self._process.wait(END_PATIENCE)
        except subprocess.TimeoutExpired:
            self.kill()
            raise ProcessFailed(f"the {self.side} worker did not end:\n{self.log_tail()}") from None

    def log_tail(self, lines: int = 30) -> str:
        """Return the last lines of the worker's log."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-lines:])


@contextmanager
def worker(
    side: Side,
    pair: Pair,
    *,
    pool: str = "prefork",
    concurrency: int = 2,
    cpus: int = 2,
    name: str = "bench",
    settings: Mapping[str, str] | None = None,
) -> Iterator[Worker]:
    """Run a worker that is ready on entry, and end it warm on exit. Kill it if the block failed.

    `cpus` is the capacity that ours publishes. Plain Celery knows only `concurrency`, the number of slots of both.
    """
    started = Worker(side, pair, pool, (concurrency, cpus), name, settings or {})
    try:
        yield started
    except BaseException:
        started.kill()
        print(f"--- the {side} worker's log ends with\n{started.log_tail()}", file=sys.stderr)
        raise
    started.end()


class Submitter:
    """A submitting process of a side. `call` runs a method of `benchmarks.submitter.Submitter` in it."""

    def __init__(self, side: Side, pair: Pair, settings: Mapping[str, str]) -> None:
        self.side = side
        self._process = subprocess.Popen(
            [pair.python, "-m", "benchmarks.submitter", side],
            cwd=pair.root,
            env=pair.environment(**settings),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    @property
    def pid(self) -> int:
        """Return the pid of the submitting process."""
        return self._process.pid

    def call(self, name: str, **arguments: Any) -> Any:
        """Return the value of the call. Raise ProcessFailed if the call raised or the process ended."""
        self.begin(name, **arguments)
        return self.answer(name)

    def begin(self, name: str, **arguments: Any) -> None:
        """Make the call, and leave its value to `answer`: several submitters can work at once."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"call": name, **arguments}) + "\n")
        self._process.stdin.flush()

    def answer(self, name: str) -> Any:
        """Return the value of the call that was begun. Raise ProcessFailed as `call` does."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ProcessFailed(f"the {self.side} submitter ended with {self._process.wait()} during {name}")
        reply = json.loads(line)
        if "error" in reply:
            raise ProcessFailed(f"{name} of the {self.side} submitter: {reply['error']}")
        return reply["value"]

    def close(self) -> None:
        """End the process by closing its input."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(END_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextmanager
def submitter(side: Side, pair: Pair, settings: Mapping[str, str] | None = None) -> Iterator[Submitter]:
    """Run a submitter process that ends with the block. `settings` are added to its environment."""
    started = Submitter(side, pair, settings or {})
    try:
        yield started
    finally:
        started.close()
