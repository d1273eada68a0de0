"""The single thread of a worker that settles its jobs with the ledger.

The main loop hands arrived messages to it, threads of the pool hand it the ends of bodies. It sends all that is pending
in one round trip, and starts the jobs that may start. Nobody waits for it.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

from celery_capacity.routing.errors import StoreUnavailable, storable
from celery_capacity.routing.lasting_warning import LastingWarning
from celery_capacity.routing.ledger.replies import (
    Arrived,
    Claimed,
    ClaimVerdict,
    Ended,
    HandedOver,
    Kept,
    LedgerClosed,
    Released,
    ReleaseVerdict,
)
from celery_capacity.routing.model.message import Tag
from celery_capacity.routing.model.request import Request, filed_shape
from celery_capacity.routing.model.states import Outcome, State, Step
from celery_capacity.routing.model.token import Token
from celery_capacity.routing.policy.placement import held_by
from celery_capacity.routing.policy.unknown_starts import is_known_before_start
from celery_capacity.routing.store.job_transitions import REVOKED, Transition
from celery_capacity.workers.broker.transport import digest_of, raw_of
from celery_capacity.workers.membership.context import WorkerContext
from celery_capacity.workers.process.claim_writer import Arrival, running
from celery_capacity.workers.process.holdings import Holding
from celery_capacity.workers.process.service import LookingService
from celery_capacity.workers.settle.lost_keys import Keyless
from celery_capacity.workers.settle.postgres_ends import End, PostgresEnds, left_by

logger = logging.getLogger(__name__)

#: Seconds between tries while the ledger does not answer, or while this process may not claim.
RETRY_AFTER: Final = 0.25
#: Most jobs settled in one round trip.
MAX_JOBS: Final = 200
#: Reasons for which an arrived message is set aside, by the verdict on its claim.
NOT_OURS: Final = {
    ClaimVerdict.FORGED: "job {0.job}: the message is not that of attempt {0.token}; its own is delivered again",
    ClaimVerdict.UNKNOWN: "there is no job {0.job}",
}
#: Most characters of an error that are kept.
ERROR_LENGTH: Final = 8000


class LedgerThread(LookingService):
    """Thread for claims and ends. `arrive` and `end` never block, in any thread. It calls `start_job` itself."""

    def __init__(
        self,
        context: WorkerContext,
        in_postgres: PostgresEnds,
        record: Callable[[Sequence[Transition]], None],
        start_job: Callable[[Any], None],
        on_closed: Callable[[], None],
        set_aside: Callable[[bytes, str, str, str], None],
    ) -> None:
        super().__init__("ledger")
        self._ledger = context.ledger
        self._identity = context.identity
        self._confirmation = context.confirmation
        self._holdings = context.holdings
        self._recorder = context.recorder
        self._record = record
        self._start_job = start_job
        self._on_closed = on_closed
        self._exclusive = context.exclusive
        self._in_postgres = in_postgres
        self._set_aside = set_aside
        #: Called when the ledger does not know a job that this worker holds: its lease was lost, or the ledger's key.
        self.on_missing: Callable[[], None] = lambda: None
        self._arrivals: deque[Arrival] = deque()
        self._ends: deque[End] = deque()
        self._keyless = Keyless(context, self._ends.append, self._said_again)
        self._returns: deque[tuple[str, Token, str]] = deque()
        self._nonces = itertools.count()
        #: Set in a signal handler: this worker's releases admit no further job here.
        self.draining = False
        self._unsure = False
        self._refused: set[str] = set()
        #: Claimed jobs that cannot start yet: this process may not decide any more, or Postgres lacks their claim.
        self._late: deque[tuple[Holding, str, Any]] = deque()
        self._retry_at = self._late_at = 0.0
        self._warning = LastingWarning(logger)

    # -- called by others ----------------------------------------------------------------------------------------

    def arrive(self, tag: Tag, request: Request, message: Any) -> None:
        """Claim the job of a message that came, then start it."""
        self._arrivals.append(Arrival(tag, request, message, f"{self._identity.pid}.{next(self._nonces)}"))
        self._confirmation.needed()
        self._wake.set()

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
        # Nobody here tells the end of a lost job that was stopped with its worker.
        is_told = outcome != Outcome.LOST or on_lost is not None
        ended = Ended(job, token, outcome, storable(error or "", ERROR_LENGTH), outbox, results, is_told)
        self._ends.append(End(ended, on_lost, whole))
        self._wake.set()
        return True

    def give_back(self, job: str, token: Token, reason: str) -> None:
        """Hand a claimed job back that cannot run here. For a moment it is not offered here again."""
        self._returns.append((job, token, reason))
        self._wake.set()

    def _said_again(self) -> None:
        self._wake.set()
        self.on_missing()

    @property
    def idle(self) -> bool:
        """Return True if nothing is held here, and nothing is to be settled."""
        return not (self._arrivals or self._ends or self._refused or self._late or self._unsure or self._holdings.all())

    # -- the thread ----------------------------------------------------------------------------------------------

    def run(self) -> None:
        while True:
            # Look at this before the ends: a repeated end is among them before `busy` is over.
            may_leave = self._stopping and not self._keyless.busy
            offering = bool(self._refused) and time.monotonic() >= self._retry_at and self._confirmation.may_admit
            if self._late and time.monotonic() >= self._late_at:
                self._late_at = time.monotonic() + RETRY_AFTER
                self._start_late()
            while self._returns:
                self._return(*self._returns.popleft())
            asking = self._unsure and self._confirmation.may_admit
            if not (self._arrivals or self._ends or offering or asking):
                if may_leave:
                    return
                self._wake.wait(RETRY_AFTER if self._refused or self._late else 60.0)
                continue
            try:
                # Not while it registers in a new epoch: books without its holdings refuse its ends.
                with self._exclusive:
                    if offering:
                        self._offer_again()
                    done = self._settle() or offering
                self._warning.over()
            except LedgerClosed:
                self._on_closed()
                done = False
            except StoreUnavailable as error:
                done = False
                self._warning.warn(f"the ledger does not answer, ends are kept: {error}")
            except Exception:
                # After any error all that is pending stays so: without this thread no job of this worker would end.
                logger.exception("the ledger's answer could not be taken; it is asked again")
                done = False
            if not done:
                if self._stopping:
                    return
                self._wake.wait(RETRY_AFTER)

    def _settle(self) -> bool:
        """Settle what is pending; return False if nothing could be done. Unanswered jobs stay pending."""
        if self._in_postgres.decides:
            return self._in_postgres.settle(self._ends, self._arrivals)
        if self._confirmation.epoch != self._ledger.epoch:
            # Until this worker is in the epoch that Postgres names, its ends belong to other books than these.
            self._on_closed()
            return False
        may_claim = self._confirmation.may_admit and not self._recorder.is_behind()
        ends = [self._ends[i] for i in range(min(MAX_JOBS, len(self._ends)))]
        arrivals = [self._arrivals[i] for i in range(min(MAX_JOBS, len(self._arrivals)))] if may_claim else []
        if self._unsure and may_claim:
            self._recover()
        if not ends and not arrivals:
            return False
        # From here to the answer: jobs that it hands over, or gives a lease of, may be lost with the answer.
        self._holdings.claiming |= (claiming := {arrival.tag.job for arrival in arrivals})
        unsure, self._unsure = self._unsure, True
        settled = self._ledger.settle(
            self._identity.name,
            self._identity.incarnation,
            ended=[end.ended for end in ends],
            arrived=[Arrived(item.tag.job, item.tag.token, item.nonce, digest_of(item.message)) for item in arrivals],
            most_losses=self._ledger.settings.most_losses,
            admit=may_claim and not self._refused,
            nonce="" if self.draining else f"{self._identity.pid}.{next(self._nonces)}",
            follow=False,
        )
        # An earlier lost answer that this worker may not ask for now is still to be asked for.
        self._unsure = unsure
        for _ in ends:
            self._ends.popleft()
        for _ in arrivals:
            self._arrivals.popleft()
        transitions = self._after_release(settled.released, {(end.ended.job, end.ended.token): end for end in ends})
        transitions += self._after_claim(arrivals, settled.claimed)
        self._holdings.claiming -= claiming
        transitions += self._take_over(settled.handed_over)
        if transitions:
            self._record(transitions)
        # Follow up now that this worker holds all of these jobs.
        self._ledger.follow(self._identity.name, settled)
        return True

    def _recover(self) -> None:
        """Ask for the jobs that a lost answer handed over. Pending claims are asked again by themselves."""
        jobs = [*self._holdings.jobs(), *(arrival.tag.job for arrival in self._arrivals)]
        handed_over = self._ledger.hand_over_again(self._identity.name, self._identity.incarnation, jobs)
        self._unsure = False
        self._record(self._take_over(handed_over))

    def _take_over(self, handed_over: Sequence[HandedOver]) -> list[Transition]:
        """Start the jobs that a release admitted here, unless they do not fit by this worker's own count."""
        transitions = []
        for job in handed_over:
            request = Request.from_shape(job.shape)
            fits = bool(self._holdings.admits({job.job: request}))
            times = (job.admitted_ms, job.started_ms)
            holding = Holding(job.job, job.token, request, "", *times, job.losses, job.rerun, filed=job.shape)
            self._holdings.add(holding)
            if fits:
                transitions += self._start(holding, job.entry, job.message)
            else:
                self._refuse(job.job, job.token, request)
        return transitions

    def _start(self, holding: Holding, entry: str, message: Any) -> list[Transition]:
        """Start a body if this process may still decide; return the transitions for Postgres.

        Another authority may have a late job. Some bodies start only when Postgres has their claim (`unknown_starts`).
        """
        if not self._may_start():
            self._late.append((holding, entry, message))
            return []
        if is_known_before_start(holding.losses, self._ledger.settings.most_losses, holding.rerun):
            self._recorder.call(partial(self._start_known, holding, entry, message))
            return []
        self._start_job(message)
        return [running(self._identity, holding, entry)]

    def _may_start(self) -> bool:
        return self._confirmation.may_admit and self._confirmation.epoch == self._ledger.epoch

    def _start_known(self, holding: Holding, entry: str, message: Any) -> None:
        """Start a body once Postgres has its claim; in a thread that may wait for Postgres."""
        claim = running(self._identity, holding, entry)
        has_claim = self._recorder.claim(claim)
        if has_claim is False:
            self.end(holding.job, holding.token, Outcome.HANDED_BACK, "its row is of another attempt")
        elif not (has_claim and self._may_start()):
            self._late.append((holding, entry, message))
            self._wake.set()
        else:
            # Record the claim, so that its entry leaves the stream.
            self._recorder.add([claim])
            self._start_job(message)

    def _start_late(self) -> None:
        """Start late jobs once this process may decide again in their epoch, or hand them back in another epoch."""
        late = [self._late.popleft() for _ in range(len(self._late))]
        left = self._in_postgres.decides or self._confirmation.epoch != self._ledger.epoch
        for holding, entry, message in late:
            if left or holding.token.epoch != self._ledger.epoch:
                self.end(holding.job, holding.token, Outcome.HANDED_BACK, "its admission came too late")
            else:
                self._record(self._start(holding, entry, message))

    def _refuse(self, job: str, token: Token, request: Request) -> None:
        """Hand back a job that does not fit by this worker's own count, and admit nothing here for a moment."""
        # Else the books would offer it again at once, for ever: they do not count attempts that run without a lease.
        logger.warning("job %s would exceed this worker's capacity by its own count: handed back", job)
        self._refused.add(request.shape)
        self._retry_at = time.monotonic() + RETRY_AFTER
        self.end(job, token, Outcome.HANDED_BACK)

    def _return(self, job: str, token: Token, reason: str) -> None:
        self._refused |= {held.request.shape for held in self._holdings.running() if held.key == (job, token)}
        self._retry_at = time.monotonic() + RETRY_AFTER
        self.end(job, token, Outcome.HANDED_BACK, reason)

    def _offer_again(self) -> None:
        """Have the jobs that were handed back placed, here or elsewhere, once the moment is over."""
        shapes, self._refused = self._refused, set()
        for shape in sorted(shapes):
            self._ledger.place_shape(shape)
        self._ledger.fill(self._identity.name)

    def _after_release(self, released: list[Released], ends: dict[tuple[str, Token], End]) -> list[Transition]:
        transitions = []
        now = self._ledger.now_ms()
        for release in released:
            end = ends.get((release.end.job, release.end.token))
            if release.verdict is ReleaseVerdict.UNKNOWN and end is not None and self._keyless.takes(end):
                continue
            holding = self._holdings.remove(release.end.job, release.end.token)
            if release.state is None:
                template = "job %s: attempt %s no longer held its lease; its end (%s) is refused"
                logger.warning(template, release.end.job, release.end.token, release.end.outcome)
                self.on_missing()
                if release.end.outcome == Outcome.SUCCEEDED and end is not None:
                    self._recorder.call(
                        partial(self._in_postgres.tell_late, release.end.job, release.end.token, left_by(end))
                    )
                continue
            if release.state == State.LOST and end is not None and end.on_lost is not None:
                self._recorder.call(end.on_lost)
            if holding is not None:
                transitions.append(self._transition(holding, release.state, release.end, release.entry, now))
        return transitions

    def _after_claim(self, arrivals: list[Arrival], claimed: list[Claimed]) -> list[Transition]:
        """Start claimed jobs that fit by this worker's own count. Only a claim tells if a message may be believed."""
        transitions = []
        for arrival, claim in zip(arrivals, claimed, strict=True):
            if claim.verdict in NOT_OURS:
                reason = NOT_OURS[claim.verdict].format(claim)
                # The ledger forgets ended jobs, Postgres does not: it knows a doubled message, however late it comes.
                ended = claim.job if claim.verdict is ClaimVerdict.UNKNOWN else ""
                self._set_aside(raw_of(arrival.message), self._identity.queue, reason, ended)
                continue
            if not claim.ok:
                logger.info("job %s: a stale or doubled message of attempt %s is dropped", claim.job, claim.token)
                continue
            fits = bool(self._holdings.admits({claim.job: arrival.request}))
            request = held_by(arrival.request, claim.losses, self._ledger.settings.most_losses)
            holding = Holding(
                claim.job,
                claim.token,
                request,
                arrival.nonce,
                claim.admitted_ms or 0,
                claim.started_ms or 0,
                claim.losses,
                claim.rerun,
                filed=filed_shape(request.shape, str(arrival.message.headers.get("task") or "")),
            )
            self._holdings.add(holding)
            arrival.message.revoked = claim.revoked
            if fits:
                transitions += self._start(holding, claim.entry, arrival.message)
            else:
                self._refuse(claim.job, claim.token, arrival.request)
        return transitions

    def _transition(self, holding: Holding, state: State, end: Ended, entry: str, now: int) -> Transition:
        # The job came back, and had been revoked meanwhile.
        stopped = state == State.CANCELLED and end.outcome is not Outcome.CANCELLED
        back = stopped or state in (State.WAITING, State.SCHEDULED, State.ACCEPTED)
        return Transition(
            job=holding.job,
            token=holding.token,
            state=state,
            step=Step.BACK if back else Step.ENDED,
            worker=self._identity.name,
            incarnation=self._identity.incarnation,
            admitted_ms=holding.admitted_ms,
            started_ms=holding.started_ms,
            at_ms=now,
            losses=holding.losses + (end.outcome == Outcome.LOST),
            outcome=end.outcome,
            error=REVOKED if stopped else end.error or "",
            entry=entry,
            # A job that runs again has nothing to deliver, except a retry that it published itself.
            outbox="" if stopped or (back and end.outcome in (Outcome.HANDED_BACK, Outcome.LOST)) else end.outbox,
            told=not stopped and end.told,
        )
