"""Settling of a worker's jobs with the ledger: arrived messages are claimed, and ended attempts are released.

All pending jobs go in one round trip, and the jobs that may start are started. The main loop does this where it need
not wait (`workers.settle.settle_loop`). Else the ledger thread does it. Nobody waits for either of them.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

from celery_capacity.routing.errors import StoreUnavailable, storable
from celery_capacity.routing.lasting_warning import LastingWarning
from celery_capacity.routing.ledger.replies import (
    Arrived,
    Ended,
    Kept,
    LedgerClosed,
    Settled,
    Settling,
)
from celery_capacity.routing.model.message import Tag
from celery_capacity.routing.model.reasons import Refusal
from celery_capacity.routing.model.request import Request
from celery_capacity.routing.model.states import Outcome
from celery_capacity.routing.model.token import Token
from celery_capacity.routing.store.job_transitions import Transition
from celery_capacity.workers.broker.transport import digest_of
from celery_capacity.workers.membership.context import WorkerContext
from celery_capacity.workers.process.claim_writer import Arrival
from celery_capacity.workers.settle.answers import RETRY_AFTER, Answers, Batch
from celery_capacity.workers.settle.postgres_ends import End, PostgresEnds
from celery_capacity.workers.settle.settle_loop import LATE, MAX_BYTES, Flight, SettleLoop
from celery_capacity.workers.supervision import job_times
from celery_capacity.workers.traces import worker

logger = logging.getLogger(__name__)

#: Most jobs settled in one round trip.
MAX_JOBS: Final = 200
#: Seconds after which a worker that got no job from a reply counts as idle: its ends start nothing.
FED_WITHIN: Final = 1.0
#: Most characters of an error that are kept.
ERROR_LENGTH: Final = 8000


class LedgerThread(Answers):
    """Thread for claims and ends. `arrive` and `end` never block, in any thread. It calls `start_job` itself."""

    def __init__(
        self,
        context: WorkerContext,
        in_postgres: PostgresEnds,
        record: Callable[[Sequence[Transition]], None],
        start_job: Callable[[Any], None],
        on_closed: Callable[[], None],
        set_aside: Callable[[bytes, str, Refusal, str, str], None],
    ) -> None:
        super().__init__(context, in_postgres, record, start_job, set_aside)
        self._on_closed = on_closed
        self._exclusive = context.exclusive
        self._arrivals: deque[Arrival] = deque()
        self._returns: deque[tuple[str, Token, str]] = deque()
        self._nonces = itertools.count()
        #: Set in a signal handler: this worker's releases admit no further job here.
        self.draining = False
        self._unsure = False
        #: Replies after which more is to be placed, which may take several calls.
        self._follows: deque[Settled] = deque()
        self._late_at = 0.0
        #: Time (monotonic) of the last reply that brought a job.
        self._fed_at = 0.0
        self.loop = SettleLoop(
            context.ledger,
            context.exclusive,
            self._is_pending,
            self._begin_in_loop,
            self._finish_in_loop,
            self._wake.set,
        )
        self._warning = LastingWarning(logger)

    # -- called by others ----------------------------------------------------------------------------------------

    def arrive(self, tag: Tag, request: Request, message: Any) -> None:
        """Claim the job of a message that came, then start it."""
        self._arrivals.append(Arrival(tag, request, message, f"{self._identity.pid}.{next(self._nonces)}"))
        self._confirmation.needed()
        self._announce()

    def end(
        self,
        job: str,
        token: Token,
        outcome: Outcome,
        error: str | None = None,
        on_lost: Callable[[], None] | None = None,
        outbox: str = "",
        results: tuple[Kept, ...] = (),
        whole: Callable[[], str] | None = None,
    ) -> bool:
        """Note that an attempt is over. Return True for the first call, which counts, and False for later ones."""
        if not self._holdings.end(job, token):
            return False
        if (traces := worker.of(self._identity.incarnation)) is not None:
            traces.over(job, token)
        if (times := job_times.of(self._identity.incarnation)) is not None:
            times.over(job, token, outcome)
        # Where a job is lost because its worker stops, another worker reports its end.
        is_told = outcome != Outcome.LOST or on_lost is not None
        ended = Ended(job, token, outcome, storable(error or "", ERROR_LENGTH), outbox, results, is_told)
        self._ends.append(End(ended, on_lost, whole))
        self._announce()
        return True

    def give_back(self, job: str, token: Token, reason: str) -> None:
        """Hand back a claimed job that cannot run here. For a moment this worker is not offered the job again."""
        self._returns.append((job, token, reason))
        self._wake.set()

    def _is_pending(self) -> bool:
        return bool(self._arrivals or self._ends)

    def _announce(self) -> None:
        """Have the main loop settle in a worker that the ledger feeds: the reply starts the next job there.

        In an idle worker the thread does this beside the main loop, which has the next body to start or to end.
        """
        is_fed = time.monotonic() - self._fed_at < FED_WITHIN
        if not (is_fed and self.loop.takes()):
            self._wake.set()

    @property
    def idle(self) -> bool:
        """Return True if nothing is held here, and nothing is to be settled."""
        return not (self._arrivals or self._ends or self._refused or self._late or self._unsure or self._holdings.all())

    # -- the thread ----------------------------------------------------------------------------------------------

    def run(self) -> None:
        try:
            self._run()
        finally:
            self.loop.close()

    def _run(self) -> None:
        while True:
            # Look at this before the ends: a repeated end is among them before `busy` is over.
            may_leave = self._stopping and not self._keyless.busy
            if self._late and time.monotonic() >= self._late_at:
                self._late_at = time.monotonic() + RETRY_AFTER
                self._start_late()
            while self._returns:
                self._return(*self._returns.popleft())
            late = self.loop.take_late()
            offering = bool(self._refused) and time.monotonic() >= self._retry_at and self._confirmation.may_admit
            asking = self._unsure and not self.loop.is_under_way and self._confirmation.may_admit
            if not (late or self._follows or offering or asking):
                if self.loop.is_under_way:
                    self._sleep(LATE)
                    continue
                if not self._is_pending():
                    if may_leave:
                        return
                    self._sleep(RETRY_AFTER if self._refused or self._late else 60.0)
                    continue
            if not self._take_turn(late, offering):
                if self._stopping:
                    return
                self._wake.wait(RETRY_AFTER)

    def _sleep(self, seconds: float) -> None:
        self.loop.looks_at = time.monotonic() + seconds
        # The main loop may have sent a call since this thread looked, and seen that it was awake.
        self._wake.wait(min(seconds, LATE) if self.loop.is_under_way else seconds)

    def _take_turn(self, late: Flight | None, offering: bool) -> bool:
        """Settle the pending ends and arrivals, and return False if nothing could be done.

        `late`: a call of the main loop, whose turn this thread has now.
        """
        try:
            if late is not None:
                self.loop.wait_for(late)
                return True
            # Not while this worker registers in a new epoch: books without its holdings refuse its ends.
            if not self._exclusive.acquire(timeout=LATE):
                # Perhaps a call of the main loop has its turn, and is late.
                return True
            try:
                if offering:
                    self._offer_again()
                done = self._settle() or offering
            finally:
                self._exclusive.release()
            self._warning.over()
            if done:
                self.loop.connect()
            return done
        except LedgerClosed:
            self._on_closed()
        except StoreUnavailable as error:
            self._warning.warn(f"the ledger does not answer, ends are kept: {error}")
        except Exception:
            # Go on after any error, with everything still pending: without this thread no job of this worker would end.
            logger.exception("the ledger's answer could not be taken; it is asked again")
        return False

    def _settle(self) -> bool:
        """Settle the pending ends and arrivals; return False if nothing could be done. Unanswered ones stay pending."""
        if self._in_postgres.decides:
            self._follows.clear()
            return self._in_postgres.settle(self._ends, self._arrivals)
        if self._confirmation.epoch != self._ledger.epoch:
            # Until this worker has joined the epoch that Postgres names, these books do not know its attempts.
            self._on_closed()
            return False
        may_claim = self._may_claim()
        # Each of these calls may take long, and the authority may change meanwhile. So look again after each of them.
        if self._unsure and may_claim:
            self._recover()
            return True
        if self._follows:
            self._ledger.follow(self._identity.name, self._follows.popleft())
            return True
        batch = self._next_batch(self._next_ends(), may_claim)
        if batch is None:
            return False
        settled = self._ledger.settle(*batch.caller, **batch.arguments, follow=False)
        self._finish(batch, settled)
        # Follow up now that this worker holds all of these jobs.
        self._ledger.follow(self._identity.name, settled)
        return True

    def _may_claim(self) -> bool:
        return self._confirmation.may_admit and not self._recorder.is_behind()

    def _next_ends(self) -> list[End]:
        """Return the oldest ends that belong to the books of this epoch.

        Postgres gave the attempts of a newer epoch: these books would refuse their ends.
        """
        oldest = [self._ends[i] for i in range(min(MAX_JOBS, len(self._ends)))]
        return list(itertools.takewhile(lambda end: end.ended.token.epoch <= self._ledger.epoch, oldest))

    def _next_batch(self, ends: list[End], may_claim: bool) -> Batch | None:
        """Return the pending ends and arrivals, None if there are none. They stay pending until the answer is there.

        A lost answer may have handed over jobs, or given leases.
        """
        arrivals = [self._arrivals[i] for i in range(min(MAX_JOBS, len(self._arrivals)))] if may_claim else []
        if not ends and not arrivals:
            return None
        claiming = {arrival.tag.job for arrival in arrivals}
        self._holdings.claiming |= claiming
        unsure, self._unsure = self._unsure, True
        arguments = {
            "ended": [end.ended for end in ends],
            "arrived": [Arrived(it.tag.job, it.tag.token, it.nonce, digest_of(it.message)) for it in arrivals],
            "most_losses": self._ledger.settings.most_losses,
            "admit": may_claim and not self._refused,
            "nonce": "" if self.draining else f"{self._identity.pid}.{next(self._nonces)}",
        }
        return Batch(ends, arrivals, claiming, unsure, (self._identity.name, self._identity.incarnation), arguments)

    def _finish(self, batch: Batch, settled: Settled, start: Callable[[], None] | None = None) -> None:
        """Take the answer to a batch, of which nothing is pending any more.

        The jobs of the answer start first, by `start` in the main loop. The notes for Postgres come after that.
        """
        for _ in batch.ends:
            self._ends.popleft()
        for _ in batch.arrivals:
            self._arrivals.popleft()
        ends = {(end.ended.job, end.ended.token): end for end in batch.ends}
        over = self._after_release(settled.released, ends)
        started = self._after_claim(batch.arrivals, settled.claimed)
        self._holdings.claiming -= batch.claiming
        if settled.handed_over:
            self._fed_at = time.monotonic()
        started += self._take_over(settled.handed_over)
        # Not before all jobs of the answer are held. An earlier lost answer is still to be asked for.
        self._unsure = batch.unsure
        try:
            if start is not None:
                start()
        finally:
            if transitions := self._endings(over) + started:
                self._record(transitions)

    # -- the main loop -------------------------------------------------------------------------------------------

    def _begin_in_loop(self) -> tuple[Batch, Settling] | None:
        """Return a batch for the main loop, None where this thread is needed, or nothing is pending."""
        needed = self._in_postgres.decides or self._confirmation.epoch != self._ledger.epoch
        if needed or self._unsure or self._refused or self._stopping:
            return None
        ends = self._next_ends()
        if sum(map(_size, ends)) > MAX_BYTES:
            return None
        batch = self._next_batch(ends, self._may_claim())
        if batch is None:
            return None
        return batch, self._ledger.prepare_settle(*batch.caller, **batch.arguments)

    def _finish_in_loop(self, batch: Batch, settled: Settled, start: Callable[[], None] | None) -> None:
        self._finish(batch, settled, start)
        if settled.shapes or any(settled.cursors) or any(settled.freed):
            self._follows.append(settled)
        if self._follows or self._late:
            self._wake.set()

    def _recover(self) -> None:
        """Ask for the jobs that a lost answer handed over. Pending claims are asked again by themselves."""
        jobs = [*self._holdings.jobs(), *(arrival.tag.job for arrival in self._arrivals)]
        handed_over = self._ledger.hand_over_again(self._identity.name, self._identity.incarnation, jobs)
        self._unsure = False
        self._record(self._take_over(handed_over))

    def _return(self, job: str, token: Token, reason: str) -> None:
        self._refused |= {held.request.shape for held in self._holdings.running() if held.key == (job, token)}
        self._retry_at = time.monotonic() + RETRY_AFTER
        self.end(job, token, Outcome.HANDED_BACK, reason)

    def _offer_again(self) -> None:
        """Have the jobs that were handed back placed on any worker, once the pause is over."""
        shapes, self._refused = self._refused, set()
        for shape in sorted(shapes):
            self._ledger.place_shape(shape)
        self._ledger.fill(self._identity.name)


def _size(end: End) -> int:
    """Return the bytes of an end that go to the ledger, a few hundred fixed ones left out."""
    ended = end.ended
    return len(ended.error or "") + len(ended.outbox) + sum(len(text) for _, _, text in ended.results)
