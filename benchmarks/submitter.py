"""A process that submits: `python -m benchmarks.submitter ours|plain`.

The process reads one JSON object a line from its standard input, `{"call": name, ...arguments}`. It answers each with
one line, `{"value": ...}` or `{"error": text}`. Both sides run this code. Only the application differs, and a process
of the plain side loads nothing of ours.
"""

from __future__ import annotations

import importlib
import json
import os
import struct
import sys
import time
import traceback
from pathlib import Path
from typing import Any, TextIO

from celery import Celery, chord, group
from celery.result import AsyncResult, ResultSet

from benchmarks.tasks import NOTE, NOTES

#: Seconds after which missing results are an error.
PATIENCE = 300.0

#: Seconds between two looks for ended tasks, while as many as may be are under way.
LOOK_SECONDS = 0.0005


class Submitter:
    """The calls of the protocol. Times are seconds of `time.perf_counter` unless a name says otherwise."""

    def __init__(self, app: Celery) -> None:
        app.loader.import_default_modules()
        self._app = app
        self._pending: list[AsyncResult[Any]] = []

    def submit(self, task: str, count: int) -> float:
        """Submit `count` tasks one by one, keep their results for `gather`, and return the seconds taken."""
        delay = self._app.tasks[task].delay
        pending = self._pending
        begin = time.perf_counter()
        for _ in range(count):
            pending.append(delay())
        return time.perf_counter() - begin

    def paced(self, rate: float, count: int) -> float:
        """Submit `count` tasks that note their ends, at `rate` a second.

        The moments at which tasks are due do not depend on how long earlier submissions took. Returns the seconds by
        which the last submission was late.
        """
        delay = self._app.tasks["bench.note"].delay
        begin = due = time.monotonic()
        for number in range(count):
            due = begin + number / rate
            # A sleep of no time costs some 50 µs, which a sender that is late does not have.
            if (early := due - time.monotonic()) > 0:
                time.sleep(early)
            delay(due)
        return time.monotonic() - due

    def saturate(self, seconds: float, under_way: int) -> int:
        """Keep this many tasks that note their ends under way for so long, and return how many were submitted."""
        delay = self._app.tasks["bench.note"].delay
        notes, size = Path(os.environ[NOTES]), struct.calcsize(NOTE)
        before = notes.stat().st_size
        until = time.monotonic() + seconds
        submitted = ended = 0
        while (now := time.monotonic()) < until:
            if submitted - ended >= under_way:
                ended = (notes.stat().st_size - before) // size
                if submitted - ended >= under_way:
                    time.sleep(LOOK_SECONDS)
                continue
            delay(now)
            submitted += 1
        return submitted

    def submit_together(self, task: str, count: int) -> float:
        """Submit `count` tasks in one call, keep their results for `gather`, and return the seconds taken.

        Our side has a call for it, plain Celery its groups.
        """
        together = getattr(self._app, "submit_many", None)
        begin = time.perf_counter()
        if together is not None:
            results = together(self._app.tasks[task], (() for _ in range(count)))
        else:
            results = group(self._app.tasks[task].si() for _ in range(count)).apply_async().results
        taken = time.perf_counter() - begin
        self._pending.extend(results)
        return taken

    def chord(self, task: str, count: int) -> float:
        """Return the seconds from a chord of `count` tasks to the result of its body, which counts them."""
        begin = time.perf_counter()
        result = chord(self._app.tasks[task].si() for _ in range(count))(self._app.tasks["bench.count"].s())
        counted = result.get(timeout=PATIENCE)
        if counted != count:
            raise RuntimeError(f"the body of a chord of {count} got {counted} values")
        return time.perf_counter() - begin

    def gather(self) -> list[Any]:
        """Wait for all tasks that were submitted since the last call. Return their values, in order of submission."""
        pending, self._pending = self._pending, []
        values: list[Any] = ResultSet(pending, app=self._app).get(timeout=PATIENCE)
        return values

    def end_to_end(self, task: str, count: int) -> float:
        """Return the seconds from the first submission to the last result."""
        begin = time.perf_counter()
        self.submit(task, count)
        self.gather()
        return time.perf_counter() - begin

    def latency(self, task: str, count: int) -> list[float]:
        """Return the milliseconds from each call to its result, for `count` tasks, one at a time."""
        delay = self._app.tasks[task].delay
        taken: list[float] = []
        for _ in range(count):
            begin = time.perf_counter()
            delay().get(timeout=PATIENCE)
            taken.append((time.perf_counter() - begin) * 1000)
        return taken

    def committed(self, by: str, count: int) -> list[float]:
        """Return the milliseconds from each commit of a transaction to the start of the one job in it.

        Makes `count` such transactions, one at a time. `by` is "session" or "connection" of SQLAlchemy. Start and end
        are times of this machine's monotonic clock, and the duration of the commit itself counts.
        """
        from sqlalchemy import create_engine, text
        from sqlalchemy.orm import Session

        task = self._app.tasks["bench.stamp"]
        engine = create_engine(os.environ["DATABASE_URL"])
        taken: list[float] = []
        for _ in range(count):
            with Session(engine) if by == "session" else engine.connect() as transaction:
                transaction.execute(text("SELECT 1"))
                result = task.apply_async(session=transaction)
                begin = time.monotonic()
                transaction.commit()
            started, _ = result.get(timeout=PATIENCE)
            taken.append((started - begin) * 1000)
        engine.dispose()
        return taken

    def grown(self, task: str, first: int, count: int) -> float:
        """Return the growth of this process's peak memory from `first` to `count` submitted tasks, in MB (10^6 bytes).

        Each number of tasks is submitted in one call from a generator.
        """
        import psutil

        process = psutil.Process()
        largest = [0, 0]

        def look(_: int) -> None:
            largest[-1] = max(largest[-1], process.memory_info().rss)

        for place, jobs in enumerate((first, count)):
            largest[-1] = 0
            self._app.submit_many(self._app.tasks[task], (() for _ in range(jobs)), progress=look)
            largest[place] = largest[-1]
        return (largest[1] - largest[0]) / 1e6

    def hold(self, jobs: list[tuple[float, dict[str, Any]]]) -> list[Any]:
        """Submit a sleeping task per (seconds, options of `apply_async`), wait for all, and return their values."""
        task = self._app.tasks["bench.hold"]
        for seconds, options in jobs:
            self._pending.append(task.apply_async((seconds,), **options))
        return self.gather()

    def timed(self, task: str, arguments: list[Any], options: dict[str, Any]) -> tuple[float, str]:
        """Submit a task, keep its result for `gather`, and return the monotonic time before it, and its id."""
        began = time.monotonic()
        result = self._app.tasks[task].apply_async(arguments, **options)
        self._pending.append(result)
        return began, str(result.id)

    def revoke(self) -> None:
        """Revoke the tasks that were submitted since the last call of `gather`."""
        for result in self._pending:
            result.revoke()

    def forget(self) -> None:
        """Wait for none of the tasks that were submitted."""
        self._pending = []

    def flood(self, task: str, arguments: list[Any], count: int, options: dict[str, Any]) -> None:
        """Submit `count` tasks with these arguments and options in one call, and wait for none."""
        self._app.submit_many(self._app.tasks[task], (arguments for _ in range(count)), **options)


def serve(submitter: Submitter, requests: TextIO, replies: TextIO) -> None:
    """Answer requests until there are no more."""
    for line in requests:
        request = json.loads(line)
        call = getattr(submitter, request.pop("call"))
        try:
            reply = {"value": call(**request)}
        except Exception as error:  # the parent reports all errors of a side
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def main() -> None:
    """Serve the side named on the command line."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # stray prints must not stand between the replies
    side = importlib.import_module(f"benchmarks.{sys.argv[1]}")
    serve(Submitter(side.create()), sys.stdin, replies)


if __name__ == "__main__":
    main()
