"""Jobs on their way to the ledger.

A sender has nothing to do with what the ledger answers: its job is durable. One that sends a single job asks the ledger
by itself, and is back when that has the job. One that sends job after job leaves them to a thread, which brings what
has come together in one step, while the sender waits for Postgres: to ask each time would cost it as much again as the
insert. The jobs go in their order, and what a process asks the ledger besides goes behind them.

What a process had not told the ledger when it died are rows that are accepted: the sweep brings them in.
"""

from __future__ import annotations

import atexit
import logging
import os
import resource
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

from celery_capacity.routing import os_threads

logger = logging.getLogger(__name__)

#: Seconds between two submissions below which they are a row of them; and those below which they are where their thread
#: waited for nothing in between but a processor.
IN_A_ROW: Final = 0.001
IN_A_ROW_BUSY: Final = 0.02
#: The share of the time since a row began for which the thread lets jobs come together, and the seconds of it at the
#: most: what one step costs hardly grows with them, and who sends for a second does not feel a hundredth of it.
GATHER: Final = 0.1
GATHER_AT_MOST: Final = 0.01
#: Jobs that wait for the thread, above which a sender waits for it.
MOST_WAITING: Final = 100
#: Bytes of their messages, likewise: the server takes them at one time, and answers nobody else meanwhile.
MOST_BYTES: Final = 4 * 1024**2
#: Seconds for which a sender waits then, and a process at its end.
PATIENCE: Final = 1.0
#: Seconds for which the thread waits for another job, before it ends.
REST_AT_MOST: Final = 5.0
#: Linux counts for each thread what it waited for.
_THREAD: Final[int | None] = getattr(resource, "RUSAGE_THREAD", None)


class Submission(NamedTuple):
    """A job for `Ledger.submit`: its arguments, in the epoch that the insert of its row confirmed. `size`: the bytes of
    its message."""

    epoch: int
    args: tuple[Any, ...]
    size: int = 0


class Moment(NamedTuple):
    """When (monotonic), in which thread, and how often that had waited for anything. (0 where nobody counts: macOS, and
    gVisor, which answers without counting. Whoever sent a job has waited for Postgres.)"""

    at: float
    thread: int = 0
    waits: int = 0

    @classmethod
    def now(cls) -> Moment:
        waits = resource.getrusage(_THREAD).ru_nvcsw if _THREAD is not None else 0
        return cls(time.monotonic(), threading.get_ident(), waits)

    def goes_on(self, at: float, now: Callable[[], Moment]) -> bool:
        """Whether what begins `at` a time, which is `now`, follows at once on what ended at this moment. (Whoever waits
        for a result in between is in a hurry to have it, not to send.)"""
        gap = at - self.at
        return gap < IN_A_ROW or (gap < IN_A_ROW_BUSY and self.waits > 0 and self[1:] == now()[1:])


class Beginning(NamedTuple):
    """When a sender began (monotonic), and whether it goes on with a row."""

    at: float
    in_a_row: bool


class Submissions:
    """The jobs that one process submits. `bring` takes them to the ledger, and raises nothing. Thread-safe; not carried
    over a fork."""

    def __init__(self, bring: Callable[[Sequence[Submission]], object]) -> None:
        self._bring = bring
        #: When the last sender was back, and when the first one of the row began.
        self._last = Moment(0.0)
        self._row = 0.0
        self._waiting: list[Submission] = []
        #: Their bytes.
        self._size = 0
        #: Jobs that were left to the thread, and those that it is done with.
        self._left = self._done = 0
        self._thread: os_threads.Thread | None = None
        #: Whether the thread waits for a job.
        self._resting = False
        #: Those who wait for it, and those who wait for its end.
        self._flushing = 0
        self._dismissing = 0
        self._changed = threading.Condition()
        _all.add(self)

    def begin(self) -> Beginning:
        """A sender begins with a job."""
        at = time.monotonic()
        return Beginning(at, self._last.goes_on(at, Moment.now))

    def add(self, job: Submission, began: Beginning, *, alone: bool) -> None:
        """Bring a job to the ledger, now or soon. `began`: what `begin` said. `alone`: now."""
        try:
            with self._changed:
                if not began.in_a_row:
                    self._row = began.at
                if began.in_a_row and not alone and not _ending and self._leave(job):
                    return
            self.flush()
            self._bring([job])
        finally:
            self._last = Moment.now()

    def flush(self) -> bool:
        """Wait until all that was added before has been brought; whether it has."""
        with self._changed:
            left = self._left
            return self._wait(lambda: self._done >= left)

    def dismiss(self) -> None:
        """The same, and have the thread end; another one follows when it is needed."""
        thread = self._thread
        if thread is None or thread is threading.current_thread():
            return
        with self._changed:
            self._dismissing += 1
            self._changed.notify_all()
        try:
            thread.join(PATIENCE)
        finally:
            with self._changed:
                self._dismissing -= 1

    def _wait(self, until: Callable[[], bool]) -> bool:
        """Have the thread hurry, and wait for it."""
        if until():
            return True
        self._flushing += 1
        self._changed.notify_all()
        try:
            return self._changed.wait_for(until, PATIENCE)
        finally:
            self._flushing -= 1

    def _leave(self, job: Submission) -> bool:
        """Leave a job to the thread; False where there can be none."""
        self._wait(lambda: len(self._waiting) < MOST_WAITING and self._size < MOST_BYTES)
        if self._thread is None:
            thread = os_threads.Thread(target=self._run, name="submissions", daemon=True)
            try:
                thread.start()
            except RuntimeError:
                # The system has no more threads for us, or the interpreter ends. (Nothing waits without a thread.)
                return False
            self._thread = thread
            _flush_at_the_end()
        self._waiting.append(job)
        self._size += job.size
        self._left += 1
        if self._resting:
            self._changed.notify_all()
        return True

    def _run(self) -> None:
        """The thread: until nothing was added for a while."""
        while jobs := self._take():
            try:
                self._bring(jobs)
            except Exception:
                # Whatever it was: the next jobs are to be brought, and the sweep brings these.
                logger.exception("%d jobs were not brought to the ledger", len(jobs))
            with self._changed:
                self._done += len(jobs)
                self._changed.notify_all()

    def _take(self) -> list[Submission]:
        with self._changed:
            self._resting = True
            self._changed.wait_for(lambda: self._waiting or self._dismissing, REST_AT_MOST)
            self._resting = False
            if self._waiting:
                gather = min(GATHER * (time.monotonic() - self._row), GATHER_AT_MOST)
                self._changed.wait_for(lambda: self._flushing or self._dismissing, gather)
            jobs, self._waiting, self._size = self._waiting, [], 0
            if not jobs:
                self._thread = None
            return jobs


_all: weakref.WeakSet[Submissions] = weakref.WeakSet()
#: Whether this process ends: nothing is left to a thread any more.
_ending = False
#: Whether `multiprocessing` has been told.
_told = False


@atexit.register
def _flush_all() -> None:
    """A program may end right after it sent something, or because of it."""
    global _ending
    _ending = True
    for submissions in list(_all):
        submissions.flush()


def _flush_at_the_end() -> None:
    """A child that `multiprocessing` forked leaves `atexit` out; it has an end of its own."""
    global _told
    if not _told:
        _told = True
        for util in map(sys.modules.get, ("multiprocessing.util", "billiard.util")):
            if util is not None:
                util.Finalize(None, _flush_all, exitpriority=0)


def _before_fork() -> None:
    """A program of one thread may fork, and no child finds a lock that a thread held which it has not."""
    for submissions in list(_all):
        submissions.dismiss()


def _after_fork() -> None:
    """A child has none of the thread, and its copy of what was to be brought is not its own to bring."""
    global _told
    _told = False
    _all.clear()


os.register_at_fork(before=_before_fork, after_in_child=_after_fork)
