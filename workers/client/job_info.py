"""All that is known of a job at a moment, for programs and as a table in notebooks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from celery_capacity.routing.model.request import Request
from celery_capacity.routing.model.states import FINAL, State
from celery_capacity.workers.display import tables


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of a job's body: `current` of `total`, as its task reported at `at`."""

    current: float
    total: float | None
    message: str | None
    at: datetime | None

    def __str__(self) -> str:
        of = "" if self.total is None else f" of {self.total:g}"
        return f"{self.current:g}{of} {self.message or ''}".strip()


@dataclass(frozen=True, slots=True)
class JobInfo:
    """A job as both stores have it now.

    `reason`: why it waits, as a word of the reference ("no-room"). `place`: its place, from 1, among the waiting jobs
    with an equal request. `before`: all waiting jobs that come before it. These are None for a job that does not wait.
    `retry_of`, `retried_as`: the job that it repeats, and the jobs that repeat it.
    """

    id: str
    task: str
    state: State
    attempt: int
    worker: str | None
    queue: str
    priority: int
    request: dict[str, Any]
    submitted_at: datetime
    admitted_at: datetime | None
    started_at: datetime | None
    finished_at: datetime | None
    error: str | None
    reason: str | None
    place: int | None
    before: int | None
    progress: Progress | None
    retry_of: str | None
    retried_as: Sequence[str]

    @property
    def final(self) -> bool:
        """Return whether the job has ended."""
        return self.state in FINAL

    def _repr_html_(self) -> str:
        """Return the job as a table, for a notebook."""
        return tables.facts(self.id, self._rows())

    def _rows(self) -> list[tuple[str, Any]]:
        before = "" if self.before is None else f", {self.before} before it"
        return [
            ("task", self.task),
            ("state", self.state.value),
            ("waits", None if self.reason is None else f"{self.reason}{before}"),
            ("worker", self.worker),
            ("request", Request.from_people(self.request)),
            ("queue", self.queue),
            ("priority", self.priority),
            ("attempt", self.attempt),
            ("progress", self.progress),
            ("submitted", _moment(self.submitted_at)),
            ("started", _moment(self.started_at)),
            ("finished", _moment(self.finished_at)),
            ("error", self.error),
            ("retry of", self.retry_of),
            ("retried as", ", ".join(self.retried_as)),
        ]


def _moment(time: datetime | None) -> str | None:
    return None if time is None else time.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def reported(kept: dict[str, Any] | None) -> Progress | None:
    """Return the progress of a job from its row."""
    if kept is None:
        return None
    at = kept.get("at")
    return Progress(kept["current"], kept.get("total"), kept.get("message"), at and datetime.fromisoformat(at))
