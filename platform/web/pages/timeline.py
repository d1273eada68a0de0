"""The life of a job as spans on a line, each attempt on a line of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from celery_capacity.platform.web.pages.bars import LENGTH
from celery_capacity.routing.store.queries import JobFile

#: Attempts that are drawn: the last ones.
MAX_ATTEMPTS: Final = 50
#: Shortest span that an eye sees, in thousandths of the line.
SHORTEST: Final = 3.0


@dataclass(frozen=True, slots=True)
class Span:
    """Part of a line. `kind`: waiting, starting, running or an outcome, as classes of the style sheet."""

    kind: str
    start: float
    length: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Line:
    """The spans of one attempt, or of the wait at the end of a job without a newer attempt."""

    attempt: Mapping[str, Any] | None
    spans: Sequence[Span]


def lines(file: JobFile) -> list[Line]:
    """Return a line for each attempt, with the wait before it. Times are those of Postgres and of the workers."""
    job = file.job
    begin: datetime = job["submitted_at"]
    end: datetime = job["finished_at"] or file.now
    whole = max((end - begin).total_seconds(), 0.001)

    def span(kind: str, start: datetime, stop: datetime) -> Span:
        seconds = max(0.0, (stop - start).total_seconds())
        begins = LENGTH * min(1.0, max(0.0, (start - begin).total_seconds() / whole))
        length = min(LENGTH * seconds / whole, LENGTH - begins)
        return Span(kind, min(begins, LENGTH - SHORTEST), max(SHORTEST, length), seconds)

    drawn, free = [], begin
    for attempt in file.attempts[-MAX_ATTEMPTS:]:
        spans = []
        admitted = attempt["admitted_at"] or free
        stop = attempt["ended_at"] or end
        if admitted > free:
            spans.append(span("waiting", free, admitted))
        started = attempt["started_at"]
        spans.append(span("starting", admitted, started or stop))
        if started is not None:
            spans.append(span(attempt["outcome"] or "running", started, stop))
        drawn.append(Line(attempt.columns, spans))
        free = max(free, stop)
    is_over = job["finished_at"] is not None or (file.attempts and file.attempts[-1]["ended_at"] is None)
    if not is_over and end > free:
        drawn.append(Line(None, [span("waiting", free, end)]))
    return drawn or [Line(None, [span("waiting" if job["finished_at"] is None else str(job["state"]), begin, end)])]
