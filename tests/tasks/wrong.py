"""Tasks whose declarations are wrong. A worker that imports them does not start."""

from __future__ import annotations

from celery import shared_task


@shared_task(cpus=-1)
def negative() -> None:
    """Fewer than no CPUs."""


@shared_task(memory="2 potatoes")
def potatoes() -> None:
    """Memory in a unit that is none."""


@shared_task(cpus=[4])
def listed() -> None:
    """A list is no number."""
