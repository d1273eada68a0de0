"""Attempt for which the code of this thread speaks, and the outbox that is delivered with its end.

The attempt is set around a body, in the pool's process or thread. In the main process it is set around the hooks of
Celery that end a job. Code that speaks for a job looks here: to store a result, to deliver a chord part, to publish.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from celery_capacity.routing.errors import NotAccepted
from celery_capacity.routing.model.job import NewJob, Publisher
from celery_capacity.routing.model.message import Tag
from celery_capacity.routing.model.outbox import Outbox

#: Most bytes of messages that go with the end of an attempt. They travel as one value through one script and one entry
#: of the stream, a third larger. Redis takes 512 MiB a value, and a worker holds the value several times.
MAX_KEPT: Final = 64 * 1024**2


@dataclass(slots=True)
class Reported:
    """Last report of an attempt's progress that is not written yet, and the time (monotonic) of the next write.

    `failed`: True if the newest write failed.
    """

    pending: dict[str, Any] | None = None
    next_at: float = 0.0
    failed: bool = False


@dataclass(frozen=True, slots=True)
class Attempt:
    """Attempt for which a thread speaks, with its outbox.

    `incarnation`: that of the worker that holds the attempt. `deferred`: True where the thread must not wait for a
    store, as in the worker's main loop. Then everything that is published goes into the outbox. `patient`: where it is
    set, the attempt waits for Postgres instead of failing, until `patient` returns False.
    """

    tag: Tag
    incarnation: str
    deferred: bool = False
    patient: Callable[[], bool] | None = None
    outbox: Outbox = field(default_factory=Outbox)
    reported: Reported = field(default_factory=Reported)

    def keep(self, jobs: Sequence[NewJob]) -> None:
        """Keep jobs that could not be published, so that they go with the end of the attempt.

        Raises `NotAccepted` where they would be larger than one value of Redis, and of the stream, can be.
        """
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
        return Publisher(self.tag.job, self.tag.token, self.incarnation)


_of_thread = threading.local()


def current() -> Attempt | None:
    """Return the attempt that runs in this thread, None outside of any."""
    attempt: Attempt | None = getattr(_of_thread, "attempt", None)
    return attempt


@contextmanager
def held(attempt: Attempt) -> Iterator[Attempt]:
    """Let this thread speak for the attempt within the block."""
    before = current()
    _of_thread.attempt = attempt
    try:
        yield attempt
    finally:
        _of_thread.attempt = before


@contextmanager
def apart() -> Iterator[None]:
    """Let this thread speak for no attempt within the block."""
    before = current()
    _of_thread.attempt = None
    try:
        yield
    finally:
        _of_thread.attempt = before
