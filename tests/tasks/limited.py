"""Tasks with limits by key, which note in a file when their bodies run."""

from __future__ import annotations

import os
import time
from typing import Any

from celery import shared_task


def note(path: str, word: str, job: str) -> None:
    """Append a line at once: its place in the file is its place in time."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(file, f"{word} {job}\n".encode())
    finally:
        os.close(file)


def of_customer(path: str, customer: int, *_: Any) -> dict[str, int]:
    """Return the limits of a call: two jobs at once for each customer."""
    return {f"customer:{customer}": 2}


@shared_task(bind=True, limit=of_customer)
def work(self: Any, path: str, customer: int, seconds: float = 0.05) -> int:
    """Work for a customer; two at once for each."""
    note(path, "start", self.request.id)
    time.sleep(seconds)
    note(path, "end", self.request.id)
    return customer


@shared_task(bind=True, limit=of_customer, max_retries=2)
def work_again(self: Any, path: str, customer: int) -> int:
    """Work for a customer, and retry twice."""
    note(path, "start", self.request.id)
    time.sleep(0.02)
    note(path, "end", self.request.id)
    if self.request.retries < 2:
        raise self.retry(countdown=0.1 * self.request.retries)
    return int(self.request.retries)


@shared_task
def total(values: list[int]) -> int:
    """Add up the results of a chord."""
    return sum(values)
