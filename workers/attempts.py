"""The attempt that the code running in this thread speaks for, and what it leaves to be delivered with its end.

Set around a body in the pool's process or thread, and around those hooks of Celery that end a job in the main process.
What speaks on behalf of a job (its result, its part of a chord, what it publishes) looks here.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from routing.message import Tag
from routing.outbox import Outbox


@dataclass(frozen=True, slots=True)
class Attempt:
    """`incarnation`: the life of the worker that holds it."""

    tag: Tag
    incarnation: str
    outbox: Outbox = field(default_factory=Outbox)


_here = threading.local()


def current() -> Attempt | None:
    """The attempt that runs in this thread, None outside of any."""
    found: Attempt | None = getattr(_here, "attempt", None)
    return found


@contextmanager
def held(attempt: Attempt) -> Iterator[Attempt]:
    """Within, this thread speaks for the attempt."""
    before = current()
    _here.attempt = attempt
    try:
        yield attempt
    finally:
        _here.attempt = before
