"""Tasks that are made into chains, groups and chords, and such as use what is not supported yet."""

from __future__ import annotations

from typing import Any

from celery import shared_task

from tests.fixtures.tasks import add


@shared_task(cpus=0.5)
def total(numbers: list[int]) -> int:
    return sum(numbers)


@shared_task(bind=True)
def replaced(self: Any, x: int) -> None:
    raise self.replace(add.s(x, 100))


@shared_task(bind=True)
def replaced_by_a_chain(self: Any, x: int) -> None:
    raise self.replace(add.s(x, 100) | add.s(1))


@shared_task(autoretry_for=(ValueError,), default_retry_delay=0, max_retries=1)
def again_by_itself() -> None:
    raise ValueError("again")


@shared_task(acks_late=True, reject_on_worker_lost=True)
def late(x: int) -> int:
    return x
