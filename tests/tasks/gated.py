"""Tasks that are unique, go by a rate, or publish such as wait for others."""

from __future__ import annotations

from typing import Any

from celery import shared_task

from tests.fixtures.tasks import add, held_at


@shared_task(unique=True)
def only(gate: str) -> str:
    """No two of one gate at once."""
    held_at(gate, only.request.id)
    return gate


@shared_task(bind=True, unique=True)
def only_again(self: Any) -> int:
    """The same, and it retries once."""
    if self.request.retries == 0:
        raise self.retry(countdown=0)
    return int(self.request.retries)


@shared_task
def twice() -> list[str]:
    """Publishes the same twice, and what waits for it; the ids of all."""
    first = add.apply_async((1, 1), unique="published within", countdown=1)
    again = add.apply_async((1, 1), unique="published within")
    last = add.apply_async((2, 2), after=first)
    return [first.id, again.id, last.id]


@shared_task(rate_limit="20/s")
def often() -> None:
    """Twenty a second, in the whole cluster."""


@shared_task(rate_limit="1/h")
def seldom() -> None:
    """One an hour, in the whole cluster."""


@shared_task
def unlimited() -> None:
    """Until somebody sets a rate for it."""
