"""Tasks for a worker whose pool is of greenlets: they wait as users' code does, compute, and are ended from outside."""

from __future__ import annotations

import os
import subprocess
import time
from typing import Any

import gevent
from celery import shared_task

import celery_capacity
from tests.fixtures.tasks import MAX_SECONDS, _client, add, held_at


@shared_task(bind=True)
def napping(self: Any, gate: str) -> float:
    """Report that it is there, sleep until the key `<gate>:over` exists, and return the time in seconds."""
    began = time.monotonic()
    with _client() as client:
        client.rpush(f"{gate}:started", f"{self.request.id} {os.getpid()}")
        while not client.exists(f"{gate}:over") and time.monotonic() - began < MAX_SECONDS:
            time.sleep(0.2)
    return time.monotonic() - began


@shared_task(bind=True)
def computing(self: Any, gate: str, file: str) -> int:
    """Report that it is there, and then give way to nobody until the file exists."""
    with _client() as client:
        client.rpush(f"{gate}:started", f"{self.request.id} {os.getpid()}")
    total = 0
    while not os.path.exists(file):
        total += sum(range(1000))
    return total


@shared_task(bind=True)
def tidy(self: Any, gate: str) -> None:
    """Wait at the gate, and report in the list `<gate>:left` that it left, for whatever reason."""
    try:
        held_at(gate, self.request.id)
    finally:
        with _client() as client:
            client.rpush(f"{gate}:left", self.request.id)


@shared_task
def asking_a_program(word: str) -> str:
    return subprocess.run(["sh", "-c", f"sleep 0.1; echo {word}"], capture_output=True, text=True, check=True).stdout


@shared_task
def sending(count: int) -> list[str]:
    """Send so many jobs in a row, and return their ids."""
    return [add.apply_async((1, number), cpus=0.005, resources={"green": 1}).id for number in range(count)]


@shared_task
def killing_itself() -> None:
    gevent.kill(gevent.getcurrent())
    time.sleep(60)


@shared_task
def awaiting(job: str) -> str:
    """Wait for another job, and return how it ended."""
    return celery_capacity.job(job).wait(timeout=MAX_SECONDS).state.value
