"""Tasks with the options that Celery's documentation gives to a body, one each."""

from __future__ import annotations

import os
from typing import Any

from celery import shared_task
from celery.exceptions import Ignore, Reject, SoftTimeLimitExceeded
from celery.result import AsyncResult

from tests.fixtures.tasks import add, held_at


class Expected(Exception):
    """An exception that a task declares."""


@shared_task(bind=True)
def seen(self: Any) -> dict[str, Any]:
    """Return the fields of its own message that a body sees."""
    request = self.request
    return {
        "id": request.id,
        "tenant": request.get("tenant"),
        "in headers": (request.headers or {}).get("tenant"),
        "shadow": request.shadow,
        "timelimit": request.timelimit,
        "root_id": request.root_id,
        "ignore_result": request.ignore_result,
        "eager": request.is_eager,
        "called": request.called_directly,
    }


@shared_task(bind=True)
def properties(self: Any) -> dict[str, Any]:
    """Return the properties of its own message."""
    return dict(self.request.properties)


@shared_task
def state_of(job: str) -> str:
    """Return the state of a job by its result. As an errback: of the job that failed."""
    state: str = AsyncResult(job).state
    return state


@shared_task(bind=True, track_started=True)
def tracked(self: Any, gate: str) -> str:
    held_at(gate, self.request.id)
    return "over"


@shared_task(bind=True)
def progressing(self: Any, gate: str) -> str:
    self.update_state(state="PROGRESS", meta={"done": 1, "of": 2})
    held_at(gate, self.request.id)
    return "over"


@shared_task(bind=True)
def stopping_half_way(self: Any) -> None:
    self.update_state(state="HALF", meta={"done": 1})
    raise Ignore


@shared_task
def rejecting() -> None:
    raise Reject("not mine", requeue=False)


@shared_task(bind=True, acks_late=True)
def rejecting_until_redelivered(self: Any) -> list[Any]:
    """Put the message back until it says that it was delivered before."""
    if not self.request.delivery_info["redelivered"]:
        raise Reject("not now", requeue=True)
    return [self.request.attempt, self.request.delivery_info["redelivered"]]


@shared_task
def rejecting_for_ever() -> None:
    raise Reject("never", requeue=True)


@shared_task(bind=True)
def redelivered(self: Any) -> list[bool]:
    """Return whether the message of each of two tries was delivered before: a retry is another message."""
    before = bool(self.request.delivery_info["redelivered"])
    if not self.request.retries:
        raise self.retry(args=(), kwargs={}, countdown=0, headers={"first": before})
    return [self.request.headers["first"], before]


@shared_task(throws=(Expected,))
def throwing(known: bool) -> None:
    raise Expected("as said") if known else ValueError("not as said")


@shared_task(ignore_result=True)
def silent(x: int) -> int:
    return x


@shared_task(ignore_result=True)
def silent_failure() -> None:
    raise ValueError("nobody hears of it")


@shared_task(ignore_result=True, store_errors_even_if_ignored=True)
def heard_failure() -> None:
    raise ValueError("heard of")


@shared_task
def leading() -> list[str]:
    """Send two children, and return their ids."""
    return [add.delay(1, 1).id, add.delay(2, 2).id]


@shared_task(trail=False)
def leading_nobody() -> list[str]:
    return [add.delay(1, 1).id]


@shared_task(bind=True, soft_time_limit=0.5, time_limit=50)
def cleaning_up(self: Any, gate: str) -> str:
    """Wait at the gate, and clean up at the soft time limit of the task."""
    try:
        held_at(gate, self.request.id)
    except SoftTimeLimitExceeded:
        return "cleaned up"
    return "in time"


@shared_task(bind=True, soft_time_limit=40, time_limit=50)
def limits(self: Any) -> list[float | None]:
    return list(self.request.timelimit)


def _named_by_what_it_does(task: Any, args: tuple[Any, ...], kwargs: dict[str, Any], options: dict[str, Any]) -> str:
    return f"adding {args[0]}"


@shared_task(bind=True, shadow_name=_named_by_what_it_does)
def shadowed(self: Any, x: int) -> str | None:
    shadow: str | None = self.request.shadow
    return shadow


@shared_task
def waiting_for_another(x: int, may: bool) -> int:
    """Wait for a task within a task, which Celery allows only with an option."""
    value: int = add.delay(x, 1).get(timeout=60, disable_sync_subtasks=not may)
    return value


@shared_task
def process() -> int:
    """Return the pid of the process that runs the task."""
    return os.getpid()


@shared_task(bind=True)
def due(self: Any, again: bool = False) -> str | None:
    """Return the time at which the task was to start, by its request."""
    if again and not self.request.retries:
        raise self.retry(countdown=0)
    eta: str | None = self.request.eta
    return eta
