"""Tasks whose declarations are wrong.

A worker that imports them does not start.
"""

from __future__ import annotations

from celery import shared_task


@shared_task(cpus=-1)
def negative() -> None:
    """Declare fewer than no CPUs."""


@shared_task(memory="2 potatoes")
def potatoes() -> None:
    """Declare memory in a unit that does not exist."""


@shared_task(cpus=[4])
def listed() -> None:
    """Declare a list instead of a number."""
