"""Tasks that submit many others."""

from __future__ import annotations

from typing import Any

from celery import group, shared_task


@shared_task(cpus=0.5)
def double(x: int, by: int = 2) -> int:
    return x * by


@shared_task(cpus=0.5)
def total(numbers: list[int]) -> int:
    return sum(numbers)


@shared_task(bind=True)
def spread(self: Any, many: int) -> list[str]:
    """Submit many jobs at once, and as many in a group; return the ids of all."""
    handle = self.app.submit_many(double, ((n,) for n in range(many)))
    together = group(double.s(n) for n in range(many)).apply_async()
    return [*handle.ids(), *(result.id for result in together.results)]
