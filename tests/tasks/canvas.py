"""Tasks that are made into chains, groups and chords, and tasks that replace themselves."""

from __future__ import annotations

import os
import signal
from typing import Any

import redis
from celery import shared_task, signature
from celery.exceptions import Ignore

from tests.fixtures.tasks import add, held_at


@shared_task(cpus=0.5)
def total(numbers: list[int]) -> int:
    return sum(numbers)


@shared_task
def listed(*values: Any) -> list[Any]:
    return list(values)


@shared_task
def failing(*_: Any) -> None:
    raise ValueError("the step failed")


@shared_task
def ignoring(*_: Any) -> None:
    raise Ignore


@shared_task(rerun=False)
def dying(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@shared_task(bind=True)
def gated(self: Any, *values: Any, gate: str) -> list[Any]:
    """Report that it is there, wait to be let go, and return its arguments."""
    held_at(gate, self.request.id)
    return list(values)


def _note(key: str, what: str) -> None:
    with redis.Redis.from_url(os.environ["REDIS_URL"]) as client:
        client.rpush(key, what)


@shared_task(bind=True)
def carried(self: Any, *_: Any, case: str) -> int:
    """Note the tenant and the priority that it was sent with."""
    request = self.request
    _note(case, f"{request.get('tenant')} {request.delivery_info['priority']}")
    return 1


@shared_task
def told(*values: Any, case: str) -> None:
    """Note, as a callback, that it was called, and with how many values."""
    _note(case, f"told {len(values)}")


@shared_task
def waiting(request: Any, error: Exception, traceback: Any, gate: str) -> None:
    """Wait at the gate, as an error callback that is called where the failure is found, and takes its time."""
    held_at(gate, request.id)


@shared_task(bind=True)
def becomes(self: Any, *given: Any, canvas: Any, gate: str | None = None, dies: bool = False) -> None:
    """Be replaced by a canvas, whose first arguments are those of this task."""
    replacement = signature(canvas, app=self.app)
    first = replacement.tasks[0] if replacement.get("subtask_type") == "chain" else replacement
    first.args = (*given, *first.args)
    if dies and self.request.attempt == 1:
        try:
            self.replace(replacement)
        except Ignore:
            os.kill(os.getpid(), signal.SIGKILL)
    if gate is not None:
        held_at(gate, self.request.id)
    raise self.replace(replacement)


@shared_task(bind=True)
def publishes_and_dies(self: Any, x: int) -> int:
    """Publish the next step of the chain in the first attempt, then die before its own end.

    A task publishes its next step at its end.
    """
    if self.request.attempt == 1:
        *later, following = self.request.chain
        signature(following, app=self.app).apply_async((x,), chain=later, parent_id=self.request.id)
        os.kill(os.getpid(), signal.SIGKILL)
    return x


@shared_task(bind=True)
def becomes_chunks(self: Any) -> None:
    raise self.replace(add.chunks([(1, 2), (3, 4), (5, 6)], 2))


@shared_task(bind=True)
def adding_to_its_chord(self: Any, x: int, more: Any) -> int:
    self.add_to_chord(signature(more, app=self.app))
    return x


@shared_task(bind=True)
def replaced(self: Any, x: int) -> None:
    raise self.replace(add.s(x, 100))


@shared_task(autoretry_for=(ValueError,), default_retry_delay=0, max_retries=1)
def again_by_itself() -> None:
    raise ValueError("again")


@shared_task(acks_late=True, reject_on_worker_lost=True)
def late(x: int) -> int:
    return x
