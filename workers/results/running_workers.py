"""Workers that run in this process, oldest first.

As a rule there is one worker. Tests start several in threads (`celery.contrib.testing`), also of one app.

A worker's state is on the worker itself. Only code that knows no more than the process, or the app, looks here.
"""

from __future__ import annotations

from typing import Final, Protocol

from celery import Celery

from celery_capacity.workers.results.chord_parts import ChordParts
from celery_capacity.workers.results.events import Announcer


class Running(Protocol):
    """A worker that runs in this process, as other code of the process sees it: a `workers.execute.runtime.Runtime`."""

    app: Celery
    parts: ChordParts
    announcer: Announcer

    def drain(self) -> None:
        """Have nothing more admitted to this worker. Safe in a signal handler."""

    def on_tick(self, name: str) -> None:
        """Pass on beat's tick."""

    def receive(self) -> None:
        """Set aside in this worker's quarantine the messages that the process receives and cannot read."""

    def stops(self, cold: bool) -> None:
        """Note that the worker stops, and whether it waits for its jobs. Safe in a signal handler."""


_running: Final[list[Running]] = []


def begin(worker: Running) -> None:
    """Add a worker that starts."""
    _running.append(worker)


def end(worker: Running) -> None:
    """Remove a worker that has left. Does nothing where it never began."""
    if worker in _running:
        _running.remove(worker)


def running() -> list[Running]:
    """Return the workers that run."""
    return list(_running)


def newest(app: Celery) -> Running | None:
    """Return the worker of the app that began last, None where the app has no worker here."""
    return next((worker for worker in reversed(running()) if worker.app is app), None)
