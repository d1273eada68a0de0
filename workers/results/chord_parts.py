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
class Part:
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


class Parts:
    """Chord parts of one worker that are being delivered. Rows name the worker by its `incarnation`."""

    def __init__(self, incarnation: str) -> None:
        self.incarnation = incarnation
        #: The process that has these threads. A child of the pool has none of them.
        self.pid = os.getpid()
        self._changed = threading.Condition()
        self._under_way: dict[Hashable, Part] = {}
        self._through: dict[Hashable, None] = {}
        self._idle: list[_Hand] = []
        self._hands = 0
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

    def bring(self, parts: Sequence[Part]) -> Iterator[Part]:
        """Deliver parts one after the other; yield each when it is delivered, late, or left for another time."""
        work = deque(part for part in parts if self._register(part))
        hand: _Hand | None = None
        for part in parts:
            with self._changed:
                if self._is_mine(part):
                    hand = hand or self._give(work)
                    if hand is None:
                        work.popleft()
                        del self._under_way[part.key]
                    elif not self._wait_for(part):
                        part.late = True
                        self._late += 1
                        # The thread keeps this part alone, and another thread goes on with the rest.
                        rest = deque(other for other in work if other is not part)
                        for other in rest:
                            work.remove(other)
                        work, hand = rest, None
            if part.late:
                self.on_late()
            yield part

    def complain(self) -> None:
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
                "what job %s left for %s does not come through in %.0f seconds, it is given up: the join of the "
                "results, or an error callback, does not end. A thread of this worker stays with it",
                part.job,
                part.chord,
                GIVEN_UP_AFTER,
            )

    def _register(self, part: Part) -> bool:
        """Return True if the caller must deliver this part, False if that is done or under way."""
        with self._changed:
            part.late = part.key in self._under_way
            part.done = not part.late and part.key in self._through
            if not (part.late or part.done):
                self._under_way[part.key] = part
        return not (part.late or part.done)

    def _is_mine(self, part: Part) -> bool:
        return self._under_way.get(part.key) is part

    def _wait_for(self, part: Part) -> bool:
        return self._changed.wait_for(lambda: not self._is_mine(part), SHORTLY if self._late else WITHIN)

    def _give(self, work: deque[Part]) -> _Hand | None:
        if self._idle:
            hand = self._idle.pop()
        elif self._hands < MAX_THREADS:
            hand = _Hand(self)
            try:
                hand.start()
            except RuntimeError as error:
                logger.error("parts of chords wait in the rows of their jobs: %s", error)
                return None
            self._hands += 1
        else:
            if not self._full:
                logger.error("%d parts of chords are late: others wait until one has come through", MAX_THREADS)
            self._full = True
            return None
        hand.work = work
        hand.given.set()
        return hand

    # -- in the threads --------------------------------------------------------------------------------------------

    def next_of(self, hand: _Hand) -> Part | None:
        with self._changed:
            if not hand.work:
                hand.given.clear()
                self._idle.append(hand)
                self._full = False
                return None
            part = hand.work.popleft()
            part.since = time.monotonic()
            return part

    def leaves(self, hand: _Hand) -> bool:
        """Return True if a thread may end, since it got no work meanwhile."""
        with self._changed:
            if hand not in self._idle:
                return False
            self._idle.remove(hand)
            self._hands -= 1
            return True

    def over(self, hand: _Hand, part: Part) -> bool:
        """Note that a part is delivered or has failed; return True if it is late, so that no caller waits for it."""
        with self._changed:
            part.done = part.error is None
            if part.done and part.remembered:
                self._through[part.key] = None
                while len(self._through) > REMEMBERED:
                    del self._through[next(iter(self._through))]
            if part.error is not None:
                # The other parts of this thread would meet the same error.
                while hand.work:
                    del self._under_way[hand.work.popleft().key]
                self._changed.notify_all()
            if not part.late:
                self.forget(part)
            return part.late

    def forget(self, part: Part) -> None:
        with self._changed:
            del self._under_way[part.key]
            self._late -= part.late
            self._changed.notify_all()


class _Hand(os_threads.Thread):
    """Thread that delivers the parts in its `work`."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(name="parts", daemon=True)
        self._parts = parts
        self.given = os_threads.Event()
        self.work: deque[Part] = deque()

    def run(self) -> None:
        while self.given.wait(IDLE) or not self._parts.leaves(self):
            while (part := self._parts.next_of(self)) is not None:
                self._deliver(part)

    def _deliver(self, part: Part) -> None:
        try:
            part.deliver()
        except Exception as error:
            part.error = error
        except BaseException:
            # For example an error callback that ends its process. It would do so again, so the part is dropped.
            logger.exception("what job %s left for %s is dropped", part.job, part.chord)
        if self._parts.over(self, part):
            try:
                part.afterwards(part.error)
            except Exception as error:
                logger.warning("that job %s has left nothing more is not noted yet: %s", part.job, error)
            self._parts.forget(part)
