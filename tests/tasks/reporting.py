"""Tasks that report how far they have come."""

from __future__ import annotations

from typing import Any

from celery import shared_task

from celery_capacity import progress
from tests.fixtures import tasks


@shared_task(bind=True)
def report(self: Any, gate: str, reports: list[list[Any]]) -> None:
    """Report these amounts, at once, and wait at the gate."""
    for amounts in reports:
        progress(*amounts)
    tasks.held_at(gate, self.request.id)


@shared_task(bind=True)
def report_by_state(self: Any, gate: str, meta: dict[str, Any]) -> None:
    """Report as Celery's own tasks do, and wait at the gate."""
    self.update_state(state="PROGRESS", meta=meta)
    tasks.held_at(gate, self.request.id)


@shared_task
def report_at_end(count: int) -> None:
    """Report many amounts within a moment, and end."""
    for number in range(count + 1):
        progress(number, count)


@shared_task
def fail_once(key: Any, value: Any = None) -> Any:
    """Fail at the first call with this value or key, and return it later. The body of a chord gets a list first."""
    key, value = (value, key) if isinstance(key, list) else (key, value)
    with tasks._client() as client:
        if client.incr(f"fail_once:{key}") == 1:
            raise ValueError(f"the first time with {key}")
    return value
