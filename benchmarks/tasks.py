"""The tasks that both sides run. Nothing here knows its side."""

from __future__ import annotations

import os
import struct
import time
from typing import Any

from celery import current_task, shared_task
from celery.signals import worker_ready

#: Environment variable with the number of the open pipe to which a worker writes one byte when it can run tasks.
READY_FD = "BENCH_READY_FD"


#: Environment variable with the file in which tasks note their ends.
NOTES = "BENCH_NOTES"

#: A note: when the job was due, and when its body ended, as two doubles in seconds of the monotonic clock.
NOTE = "dd"


@shared_task(name="bench.noop")
def noop() -> None:
    """Do nothing."""


@shared_task(name="bench.count")
def count(values: list[Any]) -> int:
    """Return the number of received values. The body of a chord."""
    return len(values)


@shared_task(name="bench.stamp")
def stamp() -> tuple[float, float]:
    """Do nothing, and return start and end in seconds of this machine's monotonic clock."""
    return time.monotonic(), time.monotonic()


@shared_task(name="bench.note", ignore_result=True)
def note(due: float) -> None:
    """Note in a file when this job was due and that it ends now. A short write to its end is never torn."""
    file = os.open(os.environ[NOTES], os.O_WRONLY | os.O_APPEND)
    try:
        os.write(file, struct.pack(NOTE, due, time.monotonic()))
    finally:
        os.close(file)


@shared_task(name="bench.hold")
def hold(seconds: float) -> tuple[float, float, str]:
    """Sleep, and return start and end in seconds of this machine's monotonic clock, and the worker's node name."""
    start = time.monotonic()
    time.sleep(seconds)  # the work itself: a job that keeps its CPUs and leaves this machine quiet
    worker = str(current_task.request.hostname)
    return start, time.monotonic(), worker


@worker_ready.connect
def announce(**_: Any) -> None:
    """Tell the process that started this worker that the worker is ready."""
    number = os.environ.get(READY_FD)
    if number is not None:
        os.write(int(number), b"r")
