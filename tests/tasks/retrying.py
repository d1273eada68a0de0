"""Tasks that retry, each in one of the ways of Celery's documentation."""

from __future__ import annotations

from typing import Any

from celery import shared_task


def _said(task: Any) -> dict[str, Any]:
    request = task.request
    return {
        "id": request.id,
        "attempt": request.attempt,
        "retries": request.retries,
        "tenant": request.get("tenant"),
        "priority": request.delivery_info["priority"],
    }


@shared_task(bind=True)
def after(self: Any, countdown: float, times: int = 1) -> dict[str, Any]:
    """Retry so many times, each after so many seconds."""
    if self.request.retries < times:
        raise self.retry(countdown=countdown, max_retries=times)
    return _said(self)


@shared_task(bind=True, autoretry_for=(OSError,), dont_autoretry_for=(FileNotFoundError,), default_retry_delay=0)
def by_itself(self: Any, error: str, times: int) -> dict[str, Any]:
    """Raise so many times; Celery retries it three times at the most."""
    if self.request.retries < times:
        raise {"passing": ConnectionError, "lasting": FileNotFoundError}[error](error)
    return _said(self)


@shared_task(bind=True, autoretry_for=(OSError,), retry_backoff=True, retry_jitter=False, max_retries=5)
def more_and_more_seldom(self: Any) -> None:
    raise OSError("never well")


@shared_task(bind=True)
def with_others(self: Any, x: int) -> int:
    """Retry once with other arguments and a larger request."""
    if self.request.retries == 0:
        raise self.retry(args=(x + 1,), countdown=0, cpus=2, memory="1MiB")
    return x


@shared_task(bind=True)
def with_priority(self: Any, priority: int) -> int:
    """Retry once with another priority, and return the one that the retry has."""
    if self.request.retries == 0:
        raise self.retry(countdown=0, priority=priority)
    return int(self.request.delivery_info["priority"])


@shared_task(bind=True, max_retries=2, default_retry_delay=0)
def without_reason(self: Any) -> None:
    raise self.retry()
