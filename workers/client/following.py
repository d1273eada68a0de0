"""Events of jobs as they come, for a program that waits in a thread, and for one that waits in an event loop.

The process hears of its jobs over one connection (`workers.process.job_watcher`). A job is looked at in the stores at
first and after a gap, so a wait asks nothing while nothing happens.
"""

from __future__ import annotations

import asyncio
import heapq
import math
import time
from collections import deque
from collections.abc import AsyncGenerator, Generator, Iterator, Mapping, Sequence
from functools import partial
from typing import Final, NamedTuple

from celery_capacity.routing import os_threads
from celery_capacity.routing.database.postgres_errors import translated
from celery_capacity.routing.errors import InvalidRequest, StoreUnavailable
from celery_capacity.routing.inspect import job_events
from celery_capacity.routing.inspect.job_events import JobEvent
from celery_capacity.routing.wake import Wake
from celery_capacity.workers.process.stores import Stores

#: Seconds after which a job is looked at again, where a store did not answer: doubled from the first to the last.
LOOK_AGAIN: Final = 1.0
LOOK_AGAIN_AT_MOST: Final = 8.0
#: Longest wait in one piece, in seconds. It begins anew then: the operating system takes no more than 24 days.
FOR_EVER: Final = 3600.0


class Look(NamedTuple):
    """State of a job in the stores.

    Where the ledger did not answer, `sure` is False unless the job has ended: Postgres hears of a change later than the
    channel of the job, so the state may be an older one and no message need follow.
    """

    event: JobEvent
    sure: bool


def look(stores: Stores, job: str) -> Look:
    """Look at the present state of a job. Raises `InvalidRequest` for an unknown job, `StoreUnavailable`."""
    # The ledger comes first: jobs that it forgets meanwhile are in Postgres.
    answer = stores.sending.ask(lambda ledger: (job_events.in_ledger(ledger.client, job),))
    with translated(), stores.engine.connect() as connection:
        row = job_events.in_postgres(connection, job)
    if row is None:
        raise InvalidRequest(f"there is no job {job}", value=job, advice="Its transaction may not be over.")
    (ledger_event,) = answer or (None,)
    event = ledger_event if ledger_event is not None and ledger_event.rank > row.rank else row
    return Look(event, answer is not None or event.final)


class Trail:
    """Order in which the events of one job are news, and the time until the job is looked at again."""

    def __init__(self) -> None:
        self.last: JobEvent | None = None
        self._pause = LOOK_AGAIN
        self._waits = False

    def look(self, stores: Stores, job: str) -> tuple[JobEvent | None, bool]:
        """Return what `look` does; from the second look on, (None, False) where no store answers."""
        try:
            return look(stores, job)
        except StoreUnavailable:
            if self.last is None:
                raise
            return None, False

    def take(self, event: JobEvent, *, looked: bool) -> bool:
        """Take an event; return True if it is news. `looked`: it comes from the stores and not from the channel."""
        if self.last is None and not looked:
            # The first look is on its way, and sees the state of this event.
            return False
        news = event.follows(self.last)
        if news:
            self.last = event
        return news

    @property
    def ended(self) -> bool:
        return self.last is not None and self.last.final

    def put_off(self) -> float | None:
        """Return the seconds after which to look again; None where such a look is coming, or the job has ended."""
        if self._waits or self.ended:
            return None
        self._waits, pause = True, self._pause
        self._pause = min(2 * pause, LOOK_AGAIN_AT_MOST)
        return pause

    def resume(self) -> None:
        """Note that the time is over: another look may be put off."""
        self._waits = False


class _Inbox:
    """Events from the watcher's thread for a thread or a greenlet, which waits without stopping others."""

    def __init__(self) -> None:
        self._items: deque[tuple[str, JobEvent | None]] = deque()
        #: The lock of the operating system, which a thread that is no greenlet shares with one that is.
        self._lock = os_threads.allocate_lock()
        self._closed = False
        self._wake = Wake()

    def put(self, job: str, event: JobEvent | None) -> None:
        with self._lock:
            if not self._closed:
                self._items.append((job, event))
                self._wake.set()

    def get(self, timeout: float | None) -> tuple[str, JobEvent | None] | None:
        """Return the next event, None after `timeout` seconds, or an hour, without any."""
        if not self._items:
            self._wake.wait(FOR_EVER if timeout is None else min(FOR_EVER, timeout))
        return self._items.popleft() if self._items else None

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._wake.close()


def follow(
    stores: Stores, jobs: Sequence[str], timeout: float | None = None, tick: float | None = None
) -> Generator[JobEvent | None]:
    """Yield the present state of each job, then each state that it comes into, until all have ended.

    Yields None after `tick` seconds without an event. Raises `TimeoutError` after `timeout` seconds, when each job was
    looked at once, `InvalidRequest` for an infinite one, and raises as `look` does.
    """
    if timeout is not None and not math.isfinite(timeout):
        raise InvalidRequest(f"timeout={timeout} is not valid", value=timeout, advice="Leave it out to wait for ever.")
    heard = _Inbox()
    trails = {job: Trail() for job in jobs}
    callbacks = {job: partial(heard.put, job) for job in trails}
    again: list[tuple[float, str]] = []
    deadline = None if timeout is None else time.monotonic() + timeout
    remaining = len(trails)
    for job, callback in callbacks.items():
        stores.watcher.watch(job, callback)
    try:
        while remaining:
            now = time.monotonic()
            while again and again[0][0] <= now:
                job = heapq.heappop(again)[1]
                trails[job].resume()
                heard.put(job, None)
            times = [deadline, again[0][0] if again else None, now + tick if tick is not None else None]
            until = min((when for when in times if when is not None), default=None)
            item = heard.get(None if until is None else max(0.0, until - now))
            if item is None:
                if deadline is not None and time.monotonic() >= deadline:
                    for state in _first_looks(stores, trails):
                        remaining -= state.final
                        yield state
                    if not remaining:
                        return
                    raise TimeoutError(f"{remaining} of {len(trails)} jobs have not ended")
                if tick is not None and until == times[2]:
                    yield None
                continue
            job, event = item
            trail, sure = trails[job], True
            if trail.ended:
                continue
            if looked := event is None:
                event, sure = trail.look(stores, job)
            news = event is not None and trail.take(event, looked=looked)
            if not sure and (pause := trail.put_off()) is not None:
                heapq.heappush(again, (time.monotonic() + pause, job))
            if event is not None and news:
                remaining -= trail.ended
                yield event
    finally:
        for job, callback in callbacks.items():
            stores.watcher.unwatch(job, callback)
        heard.close()


def _first_looks(stores: Stores, trails: Mapping[str, Trail]) -> Iterator[JobEvent]:
    """Yield the present state of each job that nobody has looked at. Raises as `look` does."""
    for job, trail in trails.items():
        if trail.last is None:
            event = look(stores, job).event
            trail.take(event, looked=True)
            yield event


async def follow_async(stores: Stores, job: str) -> AsyncGenerator[JobEvent, None]:
    """Yield the present state of a job, then each state that it comes into, until it has ended. Raises as `look`."""
    loop, heard = asyncio.get_running_loop(), asyncio.Queue[JobEvent | None]()

    def tell(event: JobEvent | None) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(heard.put_nowait, event)

    trail = Trail()

    def look_again() -> None:
        trail.resume()
        heard.put_nowait(None)

    stores.watcher.watch(job, tell)
    try:
        while not trail.ended:
            event, sure = await heard.get(), True
            if looked := event is None:
                event, sure = await asyncio.to_thread(trail.look, stores, job)
            news = event is not None and trail.take(event, looked=looked)
            if not sure and (pause := trail.put_off()) is not None:
                loop.call_later(pause, look_again)
            if event is not None and news:
                yield event
    finally:
        stores.watcher.unwatch(job, tell)
