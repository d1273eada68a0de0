"""Answers of the ledger to the ends and the arrivals of a worker: jobs start, go back, or are over for their worker.

Nothing here waits for a store, since the main loop takes answers too. Steps that may wait go to a thread of the
recorder's.
"""

from __future__ import annotations

import logging
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, NamedTuple

from celery_capacity.routing.ledger.replies import (
    Claimed,
    ClaimVerdict,
    Ended,
    HandedOver,
    Released,
    ReleaseVerdict,
)
from celery_capacity.routing.model.message import HEADER
from celery_capacity.routing.model.reasons import Refusal
from celery_capacity.routing.model.request import Request, filed_shape, split_suffix
from celery_capacity.routing.model.states import Outcome, State, Step
from celery_capacity.routing.model.token import Token
from celery_capacity.routing.policy.placement import held_by
from celery_capacity.routing.policy.unknown_starts import is_known_before_start
from celery_capacity.routing.store.job_transitions import REVOKED, Transition
from celery_capacity.workers.broker.transport import raw_of
from celery_capacity.workers.membership.context import WorkerContext
from celery_capacity.workers.process.claim_writer import Arrival, running
from celery_capacity.workers.process.holdings import Holding
from celery_capacity.workers.process.service import LookingService
from celery_capacity.workers.settle.lost_keys import LostKeys
from celery_capacity.workers.settle.postgres_ends import End, PostgresEnds, left_by
from celery_capacity.workers.traces import worker

logger = logging.getLogger(__name__)

#: Seconds between tries while the ledger does not answer, or while this process may not claim.
RETRY_AFTER: Final = 0.25
#: Text for a message that the ledger did not push and that is set aside, by the verdict on its claim.
NOT_OURS: Final = {
    ClaimVerdict.FORGED: "job {0.job}: the message is not that of attempt {0.token}; its own is delivered again",
    ClaimVerdict.UNKNOWN: "there is no job {0.job}",
}


@dataclass(frozen=True, slots=True)
class Batch:
    """Ends and arrivals that go to the ledger together.

    `claiming`: the jobs that arrived. `unsure`: True if an earlier answer is lost. `caller` and `arguments` are those
    of `Ledger.settle`.
    """

    ends: list[End]
    arrivals: list[Arrival]
    claiming: set[str]
    unsure: bool
    caller: tuple[str, str]
    arguments: dict[str, Any]


class Over(NamedTuple):
    """An attempt that is over for its worker, the state of its job now, and the stream entry that says so."""

    holding: Holding
    state: State
    end: Ended
    entry: str


class Answers(LookingService):
    """Steps that follow an answer of the ledger. One thread at a time takes them, the one that holds `exclusive`."""

    def __init__(
        self,
        context: WorkerContext,
        in_postgres: PostgresEnds,
        record: Callable[[Sequence[Transition]], None],
        start_job: Callable[[Any], None],
        set_aside: Callable[[bytes, str, Refusal, str, str], None],
    ) -> None:
        super().__init__("ledger")
        self._ledger = context.ledger
        self._identity = context.identity
        self._confirmation = context.confirmation
        self._holdings = context.holdings
        self._recorder = context.recorder
        self._in_postgres = in_postgres
        self._record = record
        self._start_job = start_job
        self._set_aside = set_aside
        #: Called when the ledger does not know a job that this worker holds: the lease or the job's key is lost.
        self.on_missing: Callable[[], None] = lambda: None
        self._ends: deque[End] = deque()
        self._keyless = LostKeys(context, self._ends.append, self._on_repeated)
        #: Shapes of jobs that were handed back, which are offered again at `_retry_at`.
        self._refused: set[str] = set()
        self._retry_at = 0.0
        #: Claimed jobs that cannot start yet: this process may not decide any more, or Postgres lacks their claim.
        self._late: deque[tuple[Holding, str, Any]] = deque()

    @abstractmethod
    def end(self, job: str, token: Token, outcome: Outcome, error: str | None = None) -> bool:
        """Note that an attempt is over."""

    def _say_missing(self) -> None:
        self.on_missing()

    def _on_repeated(self) -> None:
        self._wake.set()
        self.on_missing()

    def _take_over(self, handed_over: Sequence[HandedOver]) -> list[Transition]:
        """Start the jobs that a release admitted here, unless they do not fit by this worker's own count."""
        transitions = []
        for job in handed_over:
            request = Request.from_shape(job.shape)
            fits = bool(self._holdings.admits({job.job: request}))
            times, came = (job.admitted_ms, job.started_ms), job.submitted_ms
            facts = (request, "", *times, job.losses, job.rerun)
            holding = Holding(job.job, job.token, *facts, filed=job.shape, submitted_ms=came)
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
        # The books do not count attempts that run without a lease. They would offer the job again at once, for ever.
        logger.warning("job %s would exceed this worker's capacity by its own count: handed back", job)
        self._refused.add(request.shape)
        self._retry_at = time.monotonic() + RETRY_AFTER
        self.end(job, token, Outcome.HANDED_BACK)

    def _after_release(self, released: list[Released], ends: dict[tuple[str, Token], End]) -> list[Over]:
        """Make room for other jobs; return the attempts that are over, for `_endings`."""
        over, traces = [], worker.of(self._identity.incarnation)
        for release in released:
            end = ends.get((release.end.job, release.end.token))
            if release.verdict is ReleaseVerdict.UNKNOWN and end is not None and self._keyless.takes(end):
                continue
            holding = self._holdings.remove(release.end.job, release.end.token)
            if traces is not None:
                traces.stored(release.end)
            if release.state is None:
                template = "job %s: attempt %s no longer held its lease; its end (%s) is refused"
                logger.warning(template, release.end.job, release.end.token, release.end.outcome)
                self._recorder.call(self._say_missing)
                if release.end.outcome == Outcome.SUCCEEDED and end is not None:
                    self._recorder.call(
                        partial(self._in_postgres.tell_late, release.end.job, release.end.token, left_by(end))
                    )
                continue
            if release.state == State.LOST and end is not None and end.on_lost is not None:
                self._recorder.call(end.on_lost)
            if holding is not None:
                over.append(Over(holding, release.state, release.end, release.entry))
        return over

    def _endings(self, over: Sequence[Over]) -> list[Transition]:
        """Return the transitions of attempts that are over."""
        now = self._ledger.now_ms()
        return [self._transition(*attempt, now) for attempt in over]

    def _after_claim(self, arrivals: list[Arrival], claimed: list[Claimed]) -> list[Transition]:
        """Start claimed jobs that fit by this worker's own count. Only a claim proves that a message is genuine."""
        transitions = []
        for arrival, claim in zip(arrivals, claimed, strict=True):
            if claim.verdict in NOT_OURS:
                detail = NOT_OURS[claim.verdict].format(claim)
                # The ledger forgets ended jobs. Postgres does not, and knows even a very late doubled message.
                ended = claim.job if claim.verdict is ClaimVerdict.UNKNOWN else ""
                self._set_aside(raw_of(arrival.message), self._identity.queue, Refusal.FOREIGN, detail, ended)
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
                filed=_filed(request, arrival.message.headers),
                submitted_ms=claim.submitted_ms,
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
        return replace(
            running(self._identity, holding, entry),
            state=state,
            step=Step.BACK if back else Step.ENDED,
            at_ms=now,
            losses=holding.losses + (end.outcome == Outcome.LOST),
            outcome=end.outcome,
            error=REVOKED if stopped else end.error or "",
            # A job that runs again has nothing to deliver, except a retry that it published itself.
            outbox="" if stopped or (back and end.outcome in (Outcome.HANDED_BACK, Outcome.LOST)) else end.outbox,
            told=not stopped and end.told,
        )


def _filed(request: Request, headers: Mapping[str, Any]) -> str:
    """Return the shape under which the ledger files a job, from what it holds and the headers of its message."""
    carried = headers.get(HEADER)
    suffix = split_suffix(str(carried.get("shape")))[1] if isinstance(carried, Mapping) else ""
    return filed_shape(request.shape + suffix, str(headers.get("task") or ""))
