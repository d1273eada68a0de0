"""Tasks that are routed: by themselves, by their retries, and by the tasks that they publish."""

from __future__ import annotations

from typing import Any

from celery import shared_task


@shared_task(bind=True, queue="video")
def at_home(self: Any) -> str:
    """Run in the task's own queue, and return its name."""
    return str(self.request.delivery_info["routing_key"])


@shared_task(bind=True)
def where(self: Any) -> str:
    """Return the queue that it came by."""
    return str(self.request.delivery_info["routing_key"])


@shared_task(bind=True)
def moves(self: Any, queue: str | None = None) -> str:
    """Retry once, in the queue that it is in or in another queue, and return the queue."""
    if self.request.retries == 0:
        raise self.retry(countdown=0, **({"queue": queue} if queue else {}))
    return str(self.request.delivery_info["routing_key"])


@shared_task(bind=True)
def replaced(self: Any, queue: str) -> None:
    """Be replaced by a task in another queue."""
    raise self.replace(where.si().set(queue=queue))
