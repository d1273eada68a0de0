"""Tasks with alternatives, which report the request that each of their attempts holds."""

from __future__ import annotations

from typing import Any

from celery import shared_task

from tests.fixtures.tasks import held_at


@shared_task(bind=True, requests=[{"gpus": 1}, {"cpus": 3}])
def reports(self: Any, gate: str, times: int = 0, before: Any = ()) -> list[dict[str, int]]:
    """Wait at the gate, retry so many times, and return the request of each attempt."""
    held_at(gate, self.request.id)
    held = [*before, self.request.allocation]
    if self.request.retries < times:
        raise self.retry(args=(gate, times, held), countdown=0)
    return held


@shared_task(bind=True, requests=[{"gpus": 1}, {"cpus": 3}])
def becomes(self: Any, gate: str) -> None:
    """Wait at the gate, then be replaced by a task that declares alternatives too."""
    held_at(gate, self.request.id)
    raise self.replace(reports.s(gate, 0, [self.request.allocation]))
