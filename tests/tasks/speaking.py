"""Tasks that report on behalf of their job: results, states on the way, and jobs that they publish."""

from __future__ import annotations

import os
from typing import Any

from celery import shared_task

from tests.fixtures import tasks


def _hold(task: Any, gate: str) -> None:
    """Wait as `tests.fixtures.tasks.hold` does, with a gate for each attempt: `<gate>.<attempt>`."""
    tasks.held_at(f"{gate}.{task.request.attempt}", task.request.id)


@shared_task(bind=True)
def numbered(self: Any, gate: str, value: int = 0) -> int:
    """Wait at the gate, and return the sum of a value and the number of its attempt."""
    _hold(self, gate)
    return value + int(self.request.attempt)


@shared_task(bind=True)
def announcing(self: Any, gate: str) -> str:
    """Report a state of its own before and after the gate."""
    self.update_state(state="HALF", meta={"attempt": self.request.attempt})
    _hold(self, gate)
    self.update_state(state="LATE", meta={"attempt": self.request.attempt})
    return "done"


@shared_task(bind=True)
def sending(self: Any, gate: str, job: str) -> str:
    """Publish a job of its own after the gate."""
    _hold(self, gate)
    tasks.add.apply_async((self.request.attempt, 0), task_id=job)
    return "sent"


@shared_task(bind=True)
def again_after(self: Any, gate: str) -> int:
    """Wait at the gate at first, then retry once."""
    if self.request.retries == 0:
        _hold(self, gate)
        raise self.retry(countdown=0)
    return int(self.request.attempt)


@shared_task
def dying() -> None:
    os._exit(9)
