"""Queue whose thread works through batches: the loop of all services of a worker that get items from other threads."""

from __future__ import annotations

import logging
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Iterable, Sequence
from typing import ClassVar, Final, Generic, NamedTuple, TypeVar

from celery_capacity.workers.process.service import OnDemandService

logger = logging.getLogger(__name__)

#: Seconds for which an idle thread waits for an item before it ends.
IDLE: Final = 5.0

Item = TypeVar("Item")


class Left(NamedTuple, Generic[Item]):
    """Items of a batch that are not done.

    `kept` are tried again before all others, since nothing can be done now. `put_off` were refused alone, and are tried
    again beside the others.
    """

    kept: Sequence[Item] = ()
    put_off: Sequence[Item] = ()


class BatchThread(OnDemandService, Generic[Item]):
    """Service that works through the items that others add, batch by batch.

    `add` never blocks. The thread starts with the first item, and ends when it had none for a while. `stop` lets it try
    once more all that is pending. All state is changed with `_changed` held.
    """

    #: Most items of a batch.
    most: ClassVar[int]
    #: Seconds for which a batch is collected.
    collects: ClassVar[float] = 0.0
    #: Seconds between tries while nothing can be done.
    retry_after: Sequence[float] = (1.0,)

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._pending: deque[Item] = deque()
        #: Items that were refused alone, and when they are tried again (monotonic).
        self._put_off: deque[Item] = deque()
        self._try_again_at = 0.0
        self._working: Sequence[Item] = ()
        #: True while the thread collects a batch: it wakes by itself, or by an item that fills the batch.
        self._collecting = False

    @abstractmethod
    def _work(self, batch: Sequence[Item], *, again: bool) -> Left[Item]:
        """Work on a batch; return the items that are not done. `again`: they were put off before."""

    def _settled(self, batch: Sequence[Item], left: Left[Item], *, again: bool) -> None:
        """Take note of a batch. The caller holds `_changed`."""

    def _after_batch(self) -> None:
        """Take the step that follows a batch."""

    def _after_pause(self) -> None:
        """Take the step that follows a time without items."""

    def _give_up(self) -> None:
        """Report the pending items as lost, since this service ends and nothing can be done now."""

    # -- called by others, in any thread -------------------------------------------------------------------------

    def add(self, items: Iterable[Item]) -> None:
        with self._changed:
            self._pending.extend(items)
            self._ensure()
            if not self._collecting or len(self._pending) >= self.most:
                self._changed.notify_all()

    def unfinished(self) -> list[Item]:
        """Return all items that are not done."""
        with self._changed:
            return [*self._working, *self._pending, *self._put_off]

    def flush(self, within: float) -> bool:
        """Wait until all added items are done, `within` seconds at the most; return False if they are not."""
        with self._changed:
            within = within if self._ensure() else 0.0
            return self._changed.wait_for(lambda: not (self._working or self._pending or self._put_off), within)

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _has_work(self) -> bool:
        return bool(self._pending or self._put_off)

    # -- the thread ----------------------------------------------------------------------------------------------

    def run(self) -> None:
        failures = 0
        while True:
            batch, again = self._next_batch()
            if not batch:
                self._after_pause()
                if self._ends():
                    return
                continue
            left = Left(batch)
            try:
                left = self._work(batch, again=again)
            except Exception:
                # No error may end the thread that works on the other items.
                logger.exception("%s: %d items are kept", self.name, len(batch))
            finally:
                with self._changed:
                    # In one step, so that `flush` always finds an unfinished item in one of the lists.
                    self._working = ()
                    self._pending.extendleft(reversed(left.kept))
                    self._put_off.extend(left.put_off)
                    self._settled(batch, left, again=again)
                    self._changed.notify_all()
            self._after_batch()
            failures = failures + 1 if left.kept or (again and left.put_off) else 0
            pause = self.retry_after[min(max(0, failures - 1), len(self.retry_after) - 1)]
            if left.put_off:
                self._try_again_at = time.monotonic() + pause
            if left.kept and self._pause(pause):
                self._give_up()
                return

    def _pause(self, seconds: float) -> bool:
        """Wait before the next try; return True if this service was stopped before, so that there is none."""
        with self._changed:
            if not self._stopping:
                self._changed.wait_for(lambda: self._stopping, seconds)
                return False
            return True

    def _next_batch(self) -> tuple[Sequence[Item], bool]:
        """Return the items to work on, and whether they were put off before; none after a time without items."""
        with self._changed:
            while True:
                again_in = self._try_again_at - time.monotonic() if self._put_off and not self._stopping else None
                if again_in is not None and again_in <= 0:
                    return self._take(self._put_off), True
                if self._pending or self._stopping:
                    break
                if not self._changed.wait(IDLE if again_in is None else again_in) and again_in is None:
                    break
            if self._pending and self.collects and not self._stopping:
                self._collecting = True
                self._changed.wait_for(lambda: len(self._pending) >= self.most or self._stopping, self.collects)
                self._collecting = False
            return self._take(self._pending), False

    def _take(self, items: deque[Item]) -> Sequence[Item]:
        self._working = [items.popleft() for _ in range(min(self.most, len(items)))]
        return self._working
