"""Tasks that are unique, go by a rate, or publish jobs that wait for others."""

from __future__ import annotations

from typing import Any

from celery import shared_task

from tests.fixtures.tasks import add, held_at


@shared_task(unique=True)
def only(gate: str) -> str:
    """Hold the gate as a unique task: no two tasks of one gate run at once."""
    held_at(gate, only.request.id)
    return gate


@shared_task(bind=True, unique=True)
def only_again(self: Any) -> int:
    """Retry once, as a unique task."""
    if self.request.retries == 0:
        raise self.retry(countdown=0)
    return int(self.request.retries)


@shared_task
def twice() -> list[str]:
    """Publish an equal job twice, and a job that waits for it; return the ids of all."""
    first = add.apply_async((1, 1), unique="published within", countdown=1)
    again = add.apply_async((1, 1), unique="published within")
    last = add.apply_async((2, 2), after=first)
    return [first.id, again.id, last.id]


@shared_task(rate_limit="20/s")
def often() -> None:
    """Run twenty times a second at the most, in the whole cluster."""


@shared_task(rate_limit="1/h")
def seldom() -> None:
    """Run once an hour at the most, in the whole cluster."""


@shared_task
def unlimited() -> None:
    """Run without a rate, until somebody sets a rate for it."""
