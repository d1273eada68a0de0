"""The circuit breaker of senders: a ledger that is slow or silent costs them a moment once, not with each job.

A durable row is accepted, whatever Redis does. Only its way into the ledger is then left to the sweep. So a sender asks
the ledger as long as the ledger answers quickly. The first failure or slow answer *opens* the breaker. From then on
nobody asks, and a thread looks by itself. The breaker *closes* when an answer comes quickly again. While it is closed,
nothing looks, and the ledger gets no question beyond those of the senders.

A slow moment is soon over, and the sweep comes every ten seconds. So the newest jobs that the ledger has missed are
kept, and brought once when the breaker closes.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import groupby
from operator import attrgetter
from typing import Any, Final, NamedTuple, TypeVar

from celery_capacity.routing.config import timeouts
from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.ledger.connection import connect
from celery_capacity.routing.ledger.replies import LedgerClosed, SubmitVerdict
from celery_capacity.routing.model.job import NewJob
from celery_capacity.routing.model.reasons import Tally
from celery_capacity.routing.model.request import filed_shape
from celery_capacity.routing.policy.placement import order
from celery_capacity.workers.dispatch import call_budget
from celery_capacity.workers.dispatch.circuit import Circuit
from celery_capacity.workers.dispatch.feasibility_check import FeasibilityCheck

T = TypeVar("T")

logger = logging.getLogger(__name__)

#: Jobs that are kept while the ledger is left alone, and the bytes of their messages.
MAX_MISSED: Final = 1000
MAX_MISSED_BYTES: Final = 4 * 1024**2
#: Kept jobs that are brought in one step.
STEP: Final = 100

#: Answers to a submit that found no room.
WAITS: Final = frozenset({SubmitVerdict.WAITING, SubmitVerdict.LEFT})
#: Position of the shape in the arguments of a submission.
SHAPE: Final = 1

_epoch: Final = attrgetter("epoch")


class Submission(NamedTuple):
    """Job for `Ledger.submit`: its arguments, in the epoch that the insert of its row confirmed.

    `size`: the bytes of its message.
    """

    epoch: int
    args: tuple[Any, ...]
    size: int = 0


def ledger_row(job: NewJob, seq: int, now_ms: int, began_ms: float) -> tuple[Any, ...]:
    """Return the arguments of `Ledger.submit` for a new job, whose row was written after `began_ms`."""
    filed = filed_shape(job.shape, job.name)
    return (job.id, filed, order(job.priority, seq), job.message, 0, 0, now_ms, began_ms, job.rerun)


class Breaker:
    """Senders' own handle of the ledger. Thread-safe. Not carried over a fork: `Stores` makes a new one there.

    `tally`: counts that go with the next call.
    """

    def __init__(self, settings: Settings, tally: Tally, find_database: Callable[[], str] | None = None) -> None:
        answer_within = timeouts.QUICK_ANSWER * settings.store_timeout
        self._within = timeouts.QUICK_ATTEMPT * settings.store_timeout
        #: The client of this handle.
        self.client = call_budget.bounded(
            connect(str(settings.redis_url), socket_connect_timeout=answer_within, socket_timeout=answer_within)
        )
        self._ledger = Ledger(settings, self.client)
        self._ledger.find_database = find_database
        self._ledger.tally = tally
        self._feasibility = FeasibilityCheck(self.client)
        self._circuit = Circuit(
            self._ping,
            "the ledger is left alone until it answers quickly (jobs are accepted meanwhile)",
            "the ledger answers again",
            self._bring_missed,
        )
        #: Jobs that the ledger has not heard of, with the time (monotonic) until which they are kept; and the bytes of
        #: their messages. Both are changed with `_lock` held.
        self._missed: deque[tuple[float, Submission]] = deque()
        self._missed_bytes = 0
        self._lock = threading.Lock()
        self._keep_for = settings.sweep_interval

    @property
    def closed(self) -> bool:
        """Return True if the ledger is asked."""
        return self._circuit.closed

    def ask(self, question: Callable[[Ledger], T]) -> T | None:
        """Ask the ledger, and return its answer.

        Returns None where the ledger is left alone, or does not answer. Raises `LedgerClosed`.
        """
        answer = None
        if self._circuit.closed:
            with self._circuit.call(), call_budget.attempt(self._within):
                answer = question(self._ledger)
        return answer

    def submit(self, jobs: Sequence[Submission], *, keep: bool = True) -> None:
        """Bring durable jobs to the ledger, those of one epoch in one step.

        `keep`: keep for a while the jobs that do not reach the ledger. The duties bring in the jobs that it refuses.
        """
        for epoch, together in groupby(jobs, key=_epoch):
            group, heard = list(together), False
            if self._circuit.closed:
                try:
                    with self._circuit.call(), call_budget.attempt(self._within):
                        self._ledger.epoch = epoch
                        if len(group) > 1:
                            self._ledger.submit_many([job.args for job in group])
                            may_wait = True
                        else:
                            may_wait = self._ledger.submit_one(group[0].args).state in WAITS
                        heard = True
                        if may_wait:
                            self._feasibility.note({job.args[SHAPE] for job in group})
                except LedgerClosed:
                    # The ledger is cold, or of another epoch: a worker opens it, and brings in the accepted jobs.
                    heard = True
            if keep and not heard:
                self._miss(group)

    def _miss(self, jobs: Sequence[Submission]) -> None:
        """Keep jobs that the ledger has not heard of. Where there are too many, the oldest ones are left out."""
        until = time.monotonic() + self._keep_for
        with self._lock:
            self._missed.extend((until, job) for job in jobs)
            self._missed_bytes += sum(job.size for job in jobs)
            while len(self._missed) > MAX_MISSED or self._missed_bytes > MAX_MISSED_BYTES:
                self._missed_bytes -= self._missed.popleft()[1].size
        if self._circuit.closed:
            # The breaker closed meanwhile.
            self._bring_missed()

    def _bring_missed(self) -> None:
        """Bring the kept jobs, each of them once, but for those that the sweep has had the time to bring."""
        try:
            while self._circuit.closed and (jobs := self._next_missed()):
                self.submit(jobs, keep=False)
        except Exception:
            # The caller waits for none of these jobs, and must not get their errors.
            logger.exception("jobs that the ledger missed are left to the sweep")

    def _next_missed(self) -> list[Submission]:
        """Take the next jobs to bring in one step, without those that were kept long enough."""
        jobs: list[Submission] = []
        with self._lock:
            while self._missed and len(jobs) < STEP:
                until, job = self._missed.popleft()
                self._missed_bytes -= job.size
                if time.monotonic() < until:
                    jobs.append(job)
        return jobs

    def descriptors(self) -> list[int]:
        """Return the sockets of this handle, as numbers, for a child that inherited them."""
        return self._ledger.descriptors()

    def close(self) -> None:
        """End the connections, and the thread where there is one."""
        self._circuit.stop(self._within)
        self._feasibility.finish()
        self.client.close()

    def _ping(self) -> None:
        with call_budget.attempt(self._within):
            self.client.ping()
