"""Tasks that are routed: by themselves, by their retries, and by what they publish."""

from __future__ import annotations

from typing import Any

from celery import shared_task


@shared_task(bind=True, queue="video")
def at_home(self: Any) -> str:
    """In a queue of its own."""
    return str(self.request.delivery_info["routing_key"])


@shared_task(bind=True)
def where(self: Any) -> str:
    """The queue that it came by."""
    return str(self.request.delivery_info["routing_key"])


@shared_task(bind=True)
def moves(self: Any, queue: str | None = None) -> str:
    """Retries once, in the queue that it is in or in another one."""
    if self.request.retries == 0:
        raise self.retry(countdown=0, **({"queue": queue} if queue else {}))
    return str(self.request.delivery_info["routing_key"])


@shared_task(bind=True)
def replaced(self: Any, queue: str) -> None:
    """Replaced by a task in another queue."""
    raise self.replace(where.si().set(queue=queue))
