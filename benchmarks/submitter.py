"""A process that submits: `python -m benchmarks.submitter ours|plain`.

It reads one JSON object a line from its standard input, `{"call": name, ...arguments}`, and answers each with
one line, `{"value": ...}` or `{"error": text}`. Both sides run this code; only the application differs, and a
process of the plain side loads nothing of ours.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import traceback
from typing import Any, TextIO

from celery import Celery, chord, group
from celery.result import AsyncResult, ResultSet

#: Seconds after which missing results are an error.
PATIENCE = 300.0


class Submitter:
    """The calls of the protocol. Times are seconds of `time.perf_counter` unless a name says otherwise."""

    def __init__(self, app: Celery) -> None:
        app.loader.import_default_modules()
        self._app = app
        self._pending: list[AsyncResult[Any]] = []

    def submit(self, task: str, count: int) -> float:
        """Submits `count` tasks one by one, and keeps their results for `gather`. The seconds it took."""
        delay = self._app.tasks[task].delay
        pending = self._pending
        begin = time.perf_counter()
        for _ in range(count):
            pending.append(delay())
        return time.perf_counter() - begin

    def submit_together(self, task: str, count: int) -> float:
        """Submits `count` tasks in one call, and keeps their results for `gather`. The seconds it took.

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
        """Seconds from a chord of `count` tasks to the result of its body, which counts them."""
        begin = time.perf_counter()
        found = chord(self._app.tasks[task].si() for _ in range(count))(self._app.tasks["bench.count"].s())
        counted = found.get(timeout=PATIENCE)
        if counted != count:
            raise RuntimeError(f"the body of a chord of {count} got {counted} values")
        return time.perf_counter() - begin

    def gather(self) -> list[Any]:
        """Waits for all that was submitted since the last call. The tasks' values, in order of submission."""
        pending, self._pending = self._pending, []
        values: list[Any] = ResultSet(pending, app=self._app).get(timeout=PATIENCE)
        return values

    def end_to_end(self, task: str, count: int) -> float:
        """Seconds from the first submission to the last result."""
        begin = time.perf_counter()
        self.submit(task, count)
        self.gather()
        return time.perf_counter() - begin

    def latency(self, task: str, count: int) -> list[float]:
        """Milliseconds from the call to its result, for `count` tasks, one on its way at a time."""
        delay = self._app.tasks[task].delay
        taken: list[float] = []
        for _ in range(count):
            begin = time.perf_counter()
            delay().get(timeout=PATIENCE)
            taken.append((time.perf_counter() - begin) * 1000)
        return taken

    def committed(self, by: str, count: int) -> list[float]:
        """Milliseconds from the commit of a transaction to the start of the one job in it, for `count` of them, one on
        its way at a time. `by`: "session" or "connection" of SQLAlchemy. Both ends are of this machine's monotonic
        clock; the commit's own time counts."""
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
        """MB (10^6 bytes) by which this process is larger at its largest while it submits `count` tasks in one call
        from a generator, than at its largest while it submits `first`."""
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
        """Submits a sleeping task per (seconds, options of `apply_async`) and waits for all. Their values."""
        task = self._app.tasks["bench.hold"]
        for seconds, options in jobs:
            self._pending.append(task.apply_async((seconds,), **options))
        return self.gather()


def serve(submitter: Submitter, requests: TextIO, replies: TextIO) -> None:
    """Answers requests until there are no more."""
    for line in requests:
        request = json.loads(line)
        call = getattr(submitter, request.pop("call"))
        try:
            reply = {"value": call(**request)}
        except Exception as error:  # whatever a side raises is the parent's to report
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def main() -> None:
    """Serves the side named on the command line."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what anybody prints must not stand between the replies
    side = importlib.import_module(f"benchmarks.{sys.argv[1]}")
    serve(Submitter(side.create()), sys.stdin, replies)


if __name__ == "__main__":
    main()
