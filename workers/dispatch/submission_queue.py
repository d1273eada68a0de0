"""Jobs on their way to the ledger.

A sender does not depend on the ledger's answer: its job is durable. A sender of a single job asks the ledger by itself,
and returns when the ledger has the job. A sender of job after job leaves them to a thread. While the sender waits for
Postgres, the thread brings the jobs that have come together in one step. A question for each job would cost the sender
as much again as the insert. The jobs go in their order, and other questions of the process go behind them.

A process may die before it told the ledger of its jobs. Their rows are accepted, and the sweep brings them in.
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
from collections.abc import Callable
from typing import Final, NamedTuple, TypeVar

from celery_capacity.routing import os_threads
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.workers.dispatch.breaker import Breaker, Submission

T = TypeVar("T")

logger = logging.getLogger(__name__)

#: Seconds between two submissions below which they are in a row. The second value holds where their thread waited for
#: nothing but a processor in between.
IN_A_ROW: Final = 0.001
IN_A_ROW_BUSY: Final = 0.02
#: Seconds between two submissions of a thread from which on the row begins anew, if the thread waited in between. Such
#: a sender has time left: it sends at a rate, or as its own work comes, and its jobs need not be gathered.
PAUSE: Final = 0.0002
#: Share of the time since a row began for which the thread lets jobs come together, and its limit in seconds. The cost
#: of a step hardly grows with its jobs, and a sender of a second does not feel a hundredth of it.
GATHER: Final = 0.1
GATHER_AT_MOST: Final = 0.01
#: Number of waiting jobs from which on a sender waits for the thread.
MAX_WAITING: Final = 100
#: Bytes of their messages, likewise. The server takes them at one time, and answers nobody else meanwhile.
MAX_BYTES: Final = 4 * 1024**2
#: Seconds for which such a sender waits, and for which a process waits at its end.
PATIENCE: Final = 1.0
#: Seconds for which the thread waits for another job, before it ends.
REST_AT_MOST: Final = 5.0
#: Linux counts the waits of each thread. None where the system does not.
_THREAD: Final[int | None] = getattr(resource, "RUSAGE_THREAD", None)


class Moment(NamedTuple):
    """Moment (monotonic seconds) in a thread, and how often the thread had waited for anything.

    `waits` is 0 where nobody counts: on macOS, and on gVisor, which answers without counting. A real count is not 0,
    because a sender of a job has waited for Postgres.
    """

    at: float
    thread: int = 0
    waits: int = 0

    @classmethod
    def now(cls) -> Moment:
        waits = resource.getrusage(_THREAD).ru_nvcsw if _THREAD is not None else 0
        return cls(time.monotonic(), threading.get_ident(), waits)

    def goes_on(self, at: float, now: Callable[[], Moment]) -> bool:
        """Return True if a submission that begins `at` a time, which is `now`, follows at once on this moment.

        A caller that waits for a result in between is in a hurry to have the result, not to send.
        """
        gap = at - self.at
        return gap < IN_A_ROW or (gap < IN_A_ROW_BUSY and self.waits > 0 and self[1:] == now()[1:])

    def paused(self, at: float, now: Callable[[], Moment]) -> bool:
        """Return True if the thread waited before a submission that begins `at` a time, which is `now`.

        A wait shorter than `PAUSE` is no pause. Where nobody counts, no thread pauses.
        """
        if at - self.at < PAUSE or self.waits == 0:
            return False
        moment = now()
        return moment.thread == self.thread and moment.waits != self.waits


class Beginning(NamedTuple):
    """Moment at which a sender began (monotonic seconds), whether it goes on with a row, and whether it paused."""

    at: float
    in_a_row: bool
    paused: bool = False


class SubmissionQueue:
    """Jobs that one process submits to the ledger, in their order. Thread-safe; not carried over a fork."""

    def __init__(self, breaker: Breaker) -> None:
        self._breaker = breaker
        #: Moment at which the last sender was back, and time at which the row began, or at which its last pause ended.
        self._last = Moment(0.0)
        self._row = 0.0
        self._waiting: list[Submission] = []
        #: Bytes of the waiting jobs' messages.
        self._size = 0
        #: Number of jobs that were left to the thread, and of those that it is done with.
        self._left = self._done = 0
        self._thread: os_threads.Thread | None = None
        #: True while the thread waits for a job.
        self._resting = False
        #: Number of callers that wait for the thread, and of callers that wait for its end.
        self._flushing = 0
        self._dismissing = 0
        self._changed = threading.Condition()
        _all.add(self)

    def begin(self) -> Beginning:
        """Mark the moment at which a sender begins with a job."""
        at, last = time.monotonic(), self._last
        in_a_row = last.goes_on(at, Moment.now)
        return Beginning(at, in_a_row, in_a_row and last.paused(at, Moment.now))

    def add(self, job: Submission, began: Beginning, *, alone: bool) -> None:
        """Bring a durable job to the ledger, now or soon.

        `began`: the value that `begin` returned. `alone`: bring the job before this returns. A ledger that does not
        answer is left alone.
        """
        if not self._breaker.closed:
            self._breaker.submit([job])
            return
        try:
            with self._changed:
                if began.paused or not began.in_a_row:
                    self._row = began.at
                if began.in_a_row and not alone and not _ending and self._leave(job):
                    return
            self.flush()
            self._breaker.submit([job])
        finally:
            self._last = Moment.now()

    def ask(self, question: Callable[[Ledger], T]) -> T | None:
        """Ask the ledger, once it has the jobs that were added before, and return its answer.

        Return None where the breaker is open, or the ledger does not answer. Raises `LedgerClosed`.
        """
        self.flush()
        return self._breaker.ask(question)

    def flush(self) -> bool:
        """Wait until all jobs that were added before have been brought. Returns True if they have."""
        with self._changed:
            left = self._left
            return self._wait(lambda: self._done >= left)

    def close(self) -> None:
        """Bring all jobs, and end the connections to the ledger. A later call connects anew."""
        self.flush()
        self._breaker.close()

    def dismiss(self) -> None:
        """Have the thread bring all jobs and end, and wait for it. Another one follows when it is needed."""
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
        """Have the thread hurry, and wait for `until`, at most `PATIENCE` seconds. Returns True if it holds."""
        if until():
            return True
        self._flushing += 1
        self._changed.notify_all()
        try:
            return self._changed.wait_for(until, PATIENCE)
        finally:
            self._flushing -= 1

    def _leave(self, job: Submission) -> bool:
        """Leave a job to the thread. Returns False where there can be no thread."""
        self._wait(lambda: len(self._waiting) < MAX_WAITING and self._size < MAX_BYTES)
        if self._thread is None:
            thread = os_threads.Thread(target=self._run, name="submissions", daemon=True)
            try:
                thread.start()
            except RuntimeError:
                # The system has no more threads for us, or the interpreter ends. No job waits without a thread.
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
        """Bring jobs, in the thread, until none was added for a while."""
        while jobs := self._take():
            try:
                self._breaker.submit(jobs)
            except Exception:
                # Go on after any error: the thread must bring the next jobs, and the sweep brings these.
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


_all: weakref.WeakSet[SubmissionQueue] = weakref.WeakSet()
#: True once this process ends. Then no job is left to a thread any more.
_ending = False
#: True once `multiprocessing` has the flush.
_registered = False


@atexit.register
def _flush_all() -> None:
    """Flush all jobs at exit: a program may end right after it sent a job, or because of it."""
    global _ending
    _ending = True
    for submissions in list(_all):
        submissions.flush()


def _flush_at_the_end() -> None:
    """Flush at the end of `multiprocessing`'s children too: a forked child leaves `atexit` out."""
    global _registered
    if not _registered:
        _registered = True
        for util in map(sys.modules.get, ("multiprocessing.util", "billiard.util")):
            if util is not None:
                util.Finalize(None, _flush_all, exitpriority=0)


def _before_fork() -> None:
    """Stop the threads before a fork, so that no child inherits a lock whose owner does not exist there.

    A program of one thread may fork, so none of these threads may be left.
    """
    for submissions in list(_all):
        submissions.dismiss()


def _after_fork() -> None:
    """Forget the parent's jobs in a child: the child has no thread, and the parent brings them."""
    global _registered
    _registered = False
    _all.clear()


os.register_at_fork(before=_before_fork, after_in_child=_after_fork)
