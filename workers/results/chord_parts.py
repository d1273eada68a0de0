"""Parts of chords, delivered so that one which takes long concerns its own chord alone.

The last part of a chord joins the results of all the others, and calls the chord's error callbacks, which may be the
user's own code: it can wait for a result that nobody stores, for ever. So threads of their own deliver parts.
Whoever has a part delivered waits for a moment; what has not come through by then is *late*: its thread stays with it,
the others go on, and the row of the job says by whom it is being delivered (`Outbox.by`), so that nobody else does it
again while that worker lives.
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

#: Seconds for which a part is waited for, and the same while others are late.
WITHIN: Final = 0.5
SHORTLY: Final = 0.1
#: Seconds after which a late part is given up: nobody expects it any more, its thread stays with it.
GIVEN_UP_AFTER: Final = 60.0
#: Threads, so also parts that are late at once. Where all are taken, parts wait in the rows of their jobs.
MOST: Final = 64
#: Seconds for which a thread waits for something to do.
IDLE: Final = 30.0
#: Parts that came through of which it is known that they did.
REMEMBERED: Final = 1000


@dataclass(eq=False, slots=True)
class Part:
    """`key`: the same for all who would deliver this part. `deliver` may wait without limit. `afterwards` is called in
    the thread of a late part when it has come through, or with what it raised. `remembered`: it is not delivered again
    by this process, though a row should say later that it is to be."""

    job: str
    chord: str
    key: Hashable
    deliver: Callable[[], None]
    afterwards: Callable[[Exception | None], None]
    remembered: bool = False
    #: What became of it: neither, where it is still to be delivered.
    done: bool = False
    late: bool = False
    error: Exception | None = None
    since: float = field(default_factory=time.monotonic)
    given_up: bool = False


class Parts:
    """One for each worker. `incarnation`: its life, by which rows name it."""

    def __init__(self, incarnation: str) -> None:
        self.incarnation = incarnation
        #: (A child of the pool has none of these threads.)
        self.pid = os.getpid()
        self._changed = threading.Condition()
        self._under_way: dict[Hashable, Part] = {}
        self._through: dict[Hashable, None] = {}
        self._idle: list[_Hand] = []
        self._hands = 0
        self._late = 0
        self._full = False

    def is_under_way(self, key: Hashable) -> bool:
        with self._changed:
            return key in self._under_way

    def bring(self, parts: Sequence[Part]) -> Iterator[Part]:
        """Deliver them one after the other; yields each when it has come through, is late, or is left."""
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
                        # The thread keeps this one alone, another one goes on.
                        rest = deque(other for other in work if other is not part)
                        for other in rest:
                            work.remove(other)
                        work, hand = rest, None
            yield part

    def complain(self) -> None:
        """Give up what is late for too long."""
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
        """Whether it is for the caller to deliver. (Else somebody does or did so.)"""
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
        elif self._hands < MOST:
            hand = _Hand(self)
            try:
                hand.start()
            except RuntimeError as error:
                logger.error("parts of chords wait in the rows of their jobs: %s", error)
                return None
            self._hands += 1
        else:
            if not self._full:
                logger.error("%d parts of chords are late: others wait until one has come through", MOST)
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
        """Whether nothing was given to it meanwhile."""
        with self._changed:
            if hand not in self._idle:
                return False
            self._idle.remove(hand)
            self._hands -= 1
            return True

    def over(self, hand: _Hand, part: Part) -> bool:
        """It has come through, or failed; whether nobody waits for it."""
        with self._changed:
            part.done = part.error is None
            if part.done and part.remembered:
                self._through[part.key] = None
                while len(self._through) > REMEMBERED:
                    del self._through[next(iter(self._through))]
            if part.error is not None:
                # The others would meet with the same.
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
    """Delivers what it is given."""

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
            # (An error callback that ends its process, say. It would do so again.)
            logger.exception("what job %s left for %s is dropped", part.job, part.chord)
        if self._parts.over(self, part):
            try:
                part.afterwards(part.error)
            except Exception as error:
                logger.warning("that job %s has left nothing more is not noted yet: %s", part.job, error)
            self._parts.forget(part)
