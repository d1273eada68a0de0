"""Chord parts, delivered so that a slow part delays its own chord alone.

The last part of a chord joins the results of all the others, and calls the chord's error callbacks, which may be the
user's own code. It can wait for ever for a result that nobody stores. So threads of their own deliver chord parts.

The caller waits a moment for each part. A part that is not delivered by then is *late*. Its thread stays with it, and
another thread goes on with the other parts. The job's row names the worker that is delivering the late part
(`Outbox.by`). So nobody else delivers it again while that worker lives.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from celery_capacity.routing import os_threads

logger = logging.getLogger(__name__)

#: Seconds for which the caller waits for a part.
WITHIN: Final = 0.5
#: Seconds for which the caller waits for a part while other parts are late.
SHORTLY: Final = 0.1
#: Seconds after which a late part is given up: nobody expects it any more, but its thread stays with it.
GIVEN_UP_AFTER: Final = 60.0
#: Most threads, so also most late parts at a time. While all are taken, parts wait in the rows of their jobs.
MAX_THREADS: Final = 64
#: Seconds for which an idle thread waits for a part before it ends.
IDLE: Final = 30.0
#: Number of delivered parts that a process remembers, so that it does not deliver them again.
REMEMBERED: Final = 1000


@dataclass(eq=False, slots=True)
class ChordPart:
    """A chord part, or other work that may take long, to be delivered for a job.

    `key` is equal for all callers that would deliver this part. `deliver` may wait without limit. `afterwards` is
    called in the thread of a late part: with None once the part is delivered, else with the error. `remembered`: this
    process does not deliver the part again, even if a row says later that it should.
    """

    job: str
    chord: str
    key: Hashable
    deliver: Callable[[], None]
    afterwards: Callable[[Exception | None], None]
    remembered: bool = False
    #: Outcome of the delivery. A part that is neither done nor late is still to be delivered.
    done: bool = False
    late: bool = False
    error: Exception | None = None
    since: float = field(default_factory=time.monotonic)
    given_up: bool = False


class ChordParts:
    """Chord parts of one worker that are being delivered. Rows name the worker by its `incarnation`."""

    def __init__(self, incarnation: str) -> None:
        self.incarnation = incarnation
        #: The process that has these threads. A child of the pool has none of them.
        self.pid = os.getpid()
        self._changed = threading.Condition()
        self._under_way: dict[Hashable, ChordPart] = {}
        self._delivered: dict[Hashable, None] = {}
        self._idle: list[_PartThread] = []
        self._threads = 0
        self._late = 0
        self._full = False
        #: Called when a part is late, in the thread that waited for it.
        self.on_late: Callable[[], None] = lambda: None

    @property
    def are_late(self) -> bool:
        """Return True if a part is late."""
        return self._late > 0

    def is_under_way(self, key: Hashable) -> bool:
        with self._changed:
            return key in self._under_way

    def deliver(self, parts: Sequence[ChordPart]) -> Iterator[ChordPart]:
        """Deliver parts one after the other; yield each when it is delivered, late, or left for another time."""
        work = deque(part for part in parts if self._register(part))
        thread: _PartThread | None = None
        for part in parts:
            with self._changed:
                if self._is_mine(part):
                    thread = thread or self._start_on(work)
                    if thread is None:
                        work.popleft()
                        del self._under_way[part.key]
                    elif not self._wait_for(part):
                        part.late = True
                        self._late += 1
                        # The thread keeps this part alone, and another thread goes on with the rest.
                        rest = deque(other for other in work if other is not part)
                        for other in rest:
                            work.remove(other)
                        work, thread = rest, None
            if part.late:
                self.on_late()
            yield part

    def give_up_stuck(self) -> None:
        """Give up parts that are late for too long, and log an error for each."""
        with self._changed:
            before = time.monotonic() - GIVEN_UP_AFTER
            stuck = [
                part for part in self._under_way.values() if part.late and part.since < before and not part.given_up
            ]
            for part in stuck:
                part.given_up = True
        for part in stuck:
            logger.error(
                "the chord part that job %s left for %s is given up after %.0f seconds: the join of the results, or an "
                "error callback, does not end. A thread of this worker stays with it",
                part.job,
                part.chord,
                GIVEN_UP_AFTER,
            )

    def _register(self, part: ChordPart) -> bool:
        """Return True if the caller must deliver this part, False if that is done or under way."""
        with self._changed:
            part.late = part.key in self._under_way
            part.done = not part.late and part.key in self._delivered
            if not (part.late or part.done):
                self._under_way[part.key] = part
        return not (part.late or part.done)

    def _is_mine(self, part: ChordPart) -> bool:
        return self._under_way.get(part.key) is part

    def _wait_for(self, part: ChordPart) -> bool:
        return self._changed.wait_for(lambda: not self._is_mine(part), SHORTLY if self._late else WITHIN)

    def _start_on(self, work: deque[ChordPart]) -> _PartThread | None:
        if self._idle:
            thread = self._idle.pop()
        elif self._threads < MAX_THREADS:
            thread = _PartThread(self)
            try:
                thread.start()
            except RuntimeError as error:
                logger.error("parts of chords wait in the rows of their jobs: %s", error)
                return None
            self._threads += 1
        else:
            if not self._full:
                logger.error("%d parts of chords are late: others wait until one has come through", MAX_THREADS)
            self._full = True
            return None
        thread.work = work
        thread.has_work.set()
        return thread

    # -- in the threads --------------------------------------------------------------------------------------------

    def next_part(self, thread: _PartThread) -> ChordPart | None:
        with self._changed:
            if not thread.work:
                thread.has_work.clear()
                self._idle.append(thread)
                self._full = False
                return None
            part = thread.work.popleft()
            part.since = time.monotonic()
            return part

    def may_end(self, thread: _PartThread) -> bool:
        """Return True if a thread may end, since it got no work meanwhile."""
        with self._changed:
            if thread not in self._idle:
                return False
            self._idle.remove(thread)
            self._threads -= 1
            return True

    def end(self, thread: _PartThread, part: ChordPart) -> bool:
        """Note that a part is delivered or has failed; return True if it is late, so that no caller waits for it."""
        with self._changed:
            part.done = part.error is None
            if part.done and part.remembered:
                self._delivered[part.key] = None
                while len(self._delivered) > REMEMBERED:
                    del self._delivered[next(iter(self._delivered))]
            if part.error is not None:
                # The other parts of this thread would meet the same error.
                while thread.work:
                    del self._under_way[thread.work.popleft().key]
                self._changed.notify_all()
            if not part.late:
                self.forget(part)
            return part.late

    def forget(self, part: ChordPart) -> None:
        with self._changed:
            del self._under_way[part.key]
            self._late -= part.late
            self._changed.notify_all()


class _PartThread(os_threads.Thread):
    """Thread that delivers the parts in its `work`."""

    def __init__(self, parts: ChordParts) -> None:
        super().__init__(name="parts", daemon=True)
        self._parts = parts
        self.has_work = os_threads.Event()
        self.work: deque[ChordPart] = deque()

    def run(self) -> None:
        while self.has_work.wait(IDLE) or not self._parts.may_end(self):
            while (part := self._parts.next_part(self)) is not None:
                self._deliver(part)

    def _deliver(self, part: ChordPart) -> None:
        try:
            part.deliver()
        except Exception as error:
            part.error = error
        except BaseException:
            # For example an error callback that ends its process. It would do so again, so the part is dropped.
            logger.exception("the chord part that job %s left for %s is dropped", part.job, part.chord)
        if self._parts.end(self, part):
            try:
                part.afterwards(part.error)
            except Exception as error:
                logger.warning("the row of job %s still has an outbox that is delivered: %s", part.job, error)
            self._parts.forget(part)
