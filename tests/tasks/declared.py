"""Tasks that declare what they need, in each way in which that can be said."""

from __future__ import annotations

from typing import Any

from celery import shared_task


@shared_task
def nothing() -> None:
    """Declares nothing: the default."""


@shared_task(cpus=4)
def four() -> None:
    """Four CPUs."""


@shared_task(cpus=4, memory="2GiB")
def four_and_two() -> None:
    """Four CPUs, and memory as people write it."""


@shared_task(cpus=0.125, memory=1_000_000)
def an_eighth() -> None:
    """A part of a CPU, and memory in bytes."""


@shared_task(cpus=0)
def none_at_all() -> None:
    """No CPU: a slot alone."""


@shared_task(gpus=1, resources={"licence": 2})
def counted() -> None:
    """Counted resources."""


@shared_task(cpus=3, bind=True)
def three_again(self: Any) -> None:
    """Retries once."""
    if self.request.retries < 1:
        raise self.retry(countdown=0)
