"""Work that leaves a trace outside of Redis and Postgres, so that a test knows what really ran, when and where."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from celery import shared_task

from tests.tasks.lasting import run_on


@dataclass(frozen=True, slots=True)
class Event:
    """A line of the trace.

    `what`: start or end of a body. `millicores`: the CPUs of its job's request.
    """

    what: str
    label: str
    attempt: int
    worker: str
    millicores: int


@shared_task(bind=True)
def work(self: Any, trace: str, label: str, how_long: float | str, millicores: int = 0) -> str:
    """Note its start and its end in the file `trace`, in the order in which they came about.

    `how_long`: seconds, or the path of a gate.
    """
    worker = str(self.request.hostname).partition("@")[0]
    for what in ("start", "end"):
        event = {"what": what, "label": label, "attempt": self.request.attempt, "worker": worker}
        line = json.dumps({**event, "millicores": millicores}) + "\n"
        # Each line is one write in append mode, so that lines of several processes never mix.
        descriptor = os.open(trace, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(descriptor, line.encode())
        os.close(descriptor)
        if what == "start":
            run_on(how_long)
    return label


@shared_task
def die() -> None:
    """Kill the process that it runs in."""
    os.kill(os.getpid(), signal.SIGKILL)


def read(trace: Path) -> list[Event]:
    """Return the events so far, in order."""
    if not trace.exists():
        return []
    return [Event(**json.loads(line)) for line in trace.read_text().splitlines()]


def peaks(events: Iterable[Event]) -> dict[str, int]:
    """Return the most millicores that ran on each worker at any moment."""
    now: Counter[str] = Counter()
    most: Counter[str] = Counter()
    for event in events:
        now[event.worker] += event.millicores if event.what == "start" else -event.millicores
        most[event.worker] = max(most[event.worker], now[event.worker])
    return dict(most)


def starts(events: Iterable[Event]) -> Counter[str]:
    """Return the number of times that each label began."""
    return Counter(event.label for event in events if event.what == "start")
