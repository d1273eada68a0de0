"""A task for each way in which a body can end."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from celery import shared_task
from celery.exceptions import Ignore, Reject


@shared_task(bind=True)
def seen(self: Any) -> dict[str, Any]:
    """Return the facts that a task can see of its own job."""
    request = self.request
    return {"id": request.id, "attempt": request.attempt, "retries": request.retries}


@shared_task(bind=True)
def again(self: Any, times: int, countdown: float = 0) -> dict[str, Any]:
    """Retry so many times before it succeeds."""
    if self.request.retries < times:
        raise self.retry(exc=ValueError(f"retry {self.request.retries}"), countdown=countdown, max_retries=times)
    return {"id": self.request.id, "attempt": self.request.attempt, "retries": self.request.retries}


@shared_task(bind=True)
def never_well(self: Any, times: int) -> None:
    """Retry so many times, then fail."""
    raise self.retry(exc=ValueError("never well"), countdown=0, max_retries=times)


@shared_task(bind=True)
def again_and_more(self: Any, how: str) -> int:
    """Publish a retry, and then end in another way than by it."""
    if self.request.retries == 0:
        self.retry(countdown=0, throw=False)
        if how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "fails":
            raise ValueError("after the retry")
    return int(self.request.attempt)


class Odd(Exception):
    """An error that cannot be pickled, and cannot be made again from its arguments."""

    def __init__(self, one: int, other: int) -> None:
        super().__init__(f"odd {one + other}")
        self.held = lambda: one


@shared_task
def odd() -> None:
    raise Odd(1, 2)


@shared_task
def out_of_memory() -> None:
    raise MemoryError("there is no more")


@shared_task
def leave(code: int) -> None:
    sys.exit(code)


@shared_task
def interrupted() -> None:
    raise KeyboardInterrupt


@shared_task
def ignored() -> None:
    raise Ignore()


@shared_task
def rejected() -> None:
    raise Reject("unwanted", requeue=False)


@shared_task(bind=True)
def rejected_once(self: Any) -> int:
    """Ask for another attempt in the first attempt."""
    if self.request.attempt == 1:
        raise Reject("not now", requeue=True)
    return int(self.request.attempt)


@shared_task
def unreturnable() -> Any:
    """Return a value that JSON cannot hold."""
    return object()
