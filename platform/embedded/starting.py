"""A start of embedded servers that is under way: its steps, and the wish of another thread to give it up.

A start runs beside the thread that hears Ctrl-C. Every wait of a start asks `check`, so that it ends within moments,
and in order: each function ends the processes that it had started.
"""

from __future__ import annotations

import threading
import time

from celery_capacity.routing.errors import NoServers


class CalledOff(Exception):
    """The start was given up, and all of its processes have ended."""


class CannotStart(NoServers):
    """The embedded servers cannot start. All processes of the attempt have ended."""

    reference = "servers-cannot-start"
    title = "the embedded servers cannot start"
    default_advice = (
        "Nothing of this start runs any more. Remove the cause and start again, or set REDIS_URL and DATABASE_URL to"
        " servers of your own."
    )


class Start:
    """A start, seen by two threads: one does it, the other shows its step and may call it off."""

    def __init__(self) -> None:
        self._called_off = threading.Event()
        self._step: tuple[str, float] = ("", time.monotonic())
        #: True once the servers run that this start has made. False for servers that ran before.
        self.made = False

    def call_off(self) -> None:
        """Have the start end at its next wait."""
        self._called_off.set()

    def check(self) -> None:
        """Raise CalledOff if the start was called off."""
        if self._called_off.is_set():
            raise CalledOff

    def step(self, text: str) -> None:
        """Begin a step, with words for people. Raise CalledOff."""
        self.check()
        self._step = (text, time.monotonic())

    def present(self) -> tuple[str, float]:
        """Return the present step and its age in seconds."""
        text, since = self._step
        return text, time.monotonic() - since
