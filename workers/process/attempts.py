"""The attempt that the code running in this thread speaks for, and what it leaves to be delivered with its end.

Set around a body in the pool's process or thread, and around those hooks of Celery that end a job in the main process.
What speaks on behalf of a job (its result, its part of a chord, what it publishes) looks here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from celery_capacity.routing.errors import NotAccepted
from celery_capacity.routing.model.job import NewJob, Publisher
from celery_capacity.routing.model.message import Tag
from celery_capacity.routing.model.outbox import Outbox

#: Bytes of messages that go with the end of an attempt, at the most. They travel as one value through one script and
#: one entry of the stream, a third larger; Redis takes 512 MiB a value, and a worker holds it several times.
MAX_KEPT: Final = 64 * 1024**2


@dataclass(frozen=True, slots=True)
class Attempt:
    """`incarnation`: the life of the worker that holds it. `deferred`: this thread must not wait for a store (the
    worker's main loop), so that all that is published goes into the outbox. `patient`: it waits for Postgres instead of
    failing, until this returns False."""

    tag: Tag
    incarnation: str
    deferred: bool = False
    patient: Callable[[], bool] | None = None
    outbox: Outbox = field(default_factory=Outbox)

    def keep(self, jobs: Sequence[NewJob]) -> None:
        """Keep jobs that could not be published, to go with the end of the attempt. Raises `NotAccepted` where that
        would be more than one value of Redis, and of the stream, can be."""
        size = self.outbox.size + sum(len(job.message) for job in jobs)
        if size > MAX_KEPT:
            raise NotAccepted(
                f"job {self.tag.job} publishes more than can be kept while Postgres is away: {size} bytes of messages",
                value=size,
                advice=f"At most {MAX_KEPT} bytes go with the end of an attempt: publish less, or retry later.",
            )
        self.outbox.size = size
        self.outbox.publishes.extend(jobs)

    @property
    def publisher(self) -> Publisher:
        return Publisher(self.tag.job, self.tag.epoch, self.tag.attempt, self.incarnation)


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


@contextmanager
def apart() -> Iterator[None]:
    """Within, this thread speaks for no attempt."""
    before = current()
    _here.attempt = None
    try:
        yield
    finally:
        _here.attempt = before
