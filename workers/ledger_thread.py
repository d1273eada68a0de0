"""The one thread of a worker that settles its jobs with the ledger.

Messages that arrived and bodies that ended are put into its hands by whoever meets them (the main loop, a thread of the
pool); it sends all that is pending in one round trip, and gives back what may start. Nobody waits for it.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from routing.errors import StoreUnavailable, storable
from routing.ledger import Ledger
from routing.message import Tag
from routing.replies import Claimed, Ended, HandedOver, LedgerClosed, Released
from routing.request import Request
from routing.states import Step
from routing.store import Transition
from workers.confirmation import Confirmation
from workers.holdings import Holding, Holdings
from workers.identity import Identity
from workers.recorder import Recorder
from workers.wake import Wake

logger = logging.getLogger(__name__)

#: Attempts that a job may lose together with their workers or children, before it ends as lost.
MOST_LOSSES: Final = 3
#: Seconds between tries while the ledger does not answer, or while this process may not claim.
RETRY_AFTER: Final = 0.25
#: Jobs settled in one round trip.
MOST: Final = 200
#: Characters of an error that are kept.
ERROR_LENGTH: Final = 8000


@dataclass(frozen=True, slots=True)
class Arrival:
    """A message of this worker's queue: its tag, its request, and the message itself."""

    tag: Tag
    request: Request
    message: Any
    nonce: str


@dataclass(frozen=True, slots=True)
class End:
    """The end of a body. `on_lost` is called when the job ended as lost: its result must say so."""

    ended: Ended
    on_lost: Callable[[], None] | None = None


class LedgerThread(threading.Thread):
    """`arrive` and `end` never block and may be called in any thread. `start_job` is called in this thread."""

    def __init__(
        self,
        ledger: Ledger,
        identity: Identity,
        confirmation: Confirmation,
        holdings: Holdings,
        recorder: Recorder,
        start_job: Callable[[Any], None],
        on_closed: Callable[[], None],
        exclusive: threading.Lock,
    ) -> None:
        super().__init__(name="ledger", daemon=True)
        self._ledger = ledger
        self._identity = identity
        self._confirmation = confirmation
        self._holdings = holdings
        self._recorder = recorder
        self._start_job = start_job
        self._on_closed = on_closed
        self._exclusive = exclusive
        self._arrivals: deque[Arrival] = deque()
        self._ends: deque[End] = deque()
        self._nonces = itertools.count()
        self._wake = Wake()
        #: Set in a signal handler: this worker takes nothing over with its releases any more.
        self.draining = False
        self._stopping = False
        self._unsure = False
        self._refused: set[str] = set()
        self._retry_at = 0.0

    # -- called by others ----------------------------------------------------------------------------------------

    def arrive(self, tag: Tag, request: Request, message: Any) -> None:
        """A message came: claim its job, then start it."""
        self._arrivals.append(Arrival(tag, request, message, f"{self._identity.pid}.{next(self._nonces)}"))
        self._wake.set()

    def end(
        self,
        job: str,
        token: str,
        outcome: str,
        error: str | None = None,
        on_lost: Callable[[], None] | None = None,
    ) -> bool:
        """An attempt is over. The first call for it counts; False for the others."""
        if not self._holdings.end(job, token):
            return False
        self._ends.append(End(Ended(job, token, outcome, storable(error or "", ERROR_LENGTH)), on_lost))
        self._wake.set()
        return True

    def wake(self) -> None:
        self._wake.set()

    def stop(self, within: float) -> bool:
        """Settle what is pending, then end. False when that did not come about in time."""
        self._stopping = True
        self._wake.set()
        if self.is_alive():
            self.join(within)
        return not self.is_alive()

    # -- the thread ----------------------------------------------------------------------------------------------

    def run(self) -> None:
        while True:
            offering = bool(self._refused) and time.monotonic() >= self._retry_at and self._confirmation.may_admit
            if not (self._arrivals or self._ends or offering):
                if self._stopping:
                    return
                self._wake.wait(RETRY_AFTER if self._refused else 60.0)
                continue
            try:
                # Not while the worker registers in a new epoch: before the books know what it holds, its ends would
                # be taken for those of a stranger.
                with self._exclusive:
                    if offering:
                        self._offer_again()
                    done = self._settle() or offering
            except LedgerClosed:
                self._on_closed()
                done = False
            except StoreUnavailable as error:
                logger.warning("the ledger does not answer, ends are kept: %s", error)
                done = False
            except Exception:
                # Whatever it was, what is pending stays so: without this thread nothing of this worker would ever end.
                logger.exception("the ledger's answer could not be taken; it is asked again")
                done = False
            if not done:
                if self._stopping:
                    return
                self._wake.wait(RETRY_AFTER)

    def _settle(self) -> bool:
        """Settle what is pending; what was not answered stays pending. False where there was nothing it could do."""
        may_claim = self._confirmation.may_admit
        ends = [self._ends[i] for i in range(min(MOST, len(self._ends)))]
        arrivals = [self._arrivals[i] for i in range(min(MOST, len(self._arrivals)))] if may_claim else []
        if self._unsure and may_claim:
            self._recover()
        if not ends and not arrivals:
            return False
        fitting = self._holdings.admits({one.tag.job: one.request for one in arrivals})
        claims = [one for one in arrivals if one.tag.job in fitting]
        refused = [
            self._refuse(one.tag.job, one.tag.token, one.request) for one in arrivals if one.tag.job not in fitting
        ]
        # From here to the answer: what it hands over may be lost with it.
        self._unsure = True
        settled = self._ledger.settle(
            self._identity.name,
            self._identity.incarnation,
            ended=[one.ended for one in ends] + refused,
            arrived=[(one.tag.job, one.tag.token, one.nonce) for one in claims],
            most_losses=MOST_LOSSES,
            admit=may_claim and not self._refused,
            nonce="" if self.draining else f"{self._identity.pid}.{next(self._nonces)}",
        )
        self._unsure = False
        for _ in ends:
            self._ends.popleft()
        for _ in arrivals:
            self._arrivals.popleft()
        transitions = self._after_release(settled.released, {one.ended.job: one for one in ends})
        transitions += self._after_claim(claims, settled.claimed)
        transitions += self._take_over(settled.handed_over)
        if transitions:
            self._recorder.add(transitions)
        return True

    def _recover(self) -> None:
        """An answer was lost: ask for what it handed over. Claims that are pending are asked again by themselves."""
        known = [*self._holdings.jobs(), *(one.tag.job for one in self._arrivals)]
        handed_over = self._ledger.recover(self._identity.name, self._identity.incarnation, known)
        self._unsure = False
        self._recorder.add(self._take_over(handed_over))

    def _take_over(self, handed_over: Sequence[HandedOver]) -> list[Transition]:
        """Start what a release admitted here, unless it does not fit by this worker's own count."""
        transitions = []
        for one in handed_over:
            request = Request.from_shape(one.shape)
            fits = bool(self._holdings.admits({one.job: request}))
            holding = Holding(one.job, one.token, request, "", one.admitted_ms, one.started_ms, one.losses)
            self._holdings.add(holding)
            if fits:
                transitions.append(running(self._identity, holding, one.entry))
                self._start_job(one.message)
            else:
                self._refuse(one.job, one.token, request)
                self.end(one.job, one.token, "handed_back")
        return transitions

    def _refuse(self, job: str, token: str, request: Request) -> Ended:
        """Hand a job back: by this worker's own count (which has attempts that lost their lease and still run) it does
        not fit. Nothing is admitted here for a moment, or the books would offer it again at once, for ever."""
        logger.warning("job %s would exceed this worker's capacity by its own count: handed back", job)
        self._refused.add(request.shape)
        self._retry_at = time.monotonic() + RETRY_AFTER
        return Ended(job, token, "handed_back")

    def _offer_again(self) -> None:
        """The moment is over: what was handed back finds its place, here or elsewhere."""
        shapes, self._refused = self._refused, set()
        for shape in sorted(shapes):
            self._ledger.place(shape)
        self._ledger.fill(self._identity.name)

    def _after_release(self, released: list[Released], ends: dict[str, End]) -> list[Transition]:
        transitions = []
        now = self._ledger.now_ms()
        for one in released:
            holding = self._holdings.remove(one.end.job, one.end.token)
            if one.verdict == "stale":
                logger.warning(
                    "job %s: attempt %s no longer held its lease; its end (%s) is refused",
                    one.end.job,
                    one.end.token,
                    one.end.outcome,
                )
                continue
            end = ends.get(one.end.job)
            if one.state == "lost" and end is not None and end.on_lost is not None:
                self._recorder.call(end.on_lost)
            if holding is not None:
                transitions.append(self._transition(holding, one.state, one.end, one.entry, now))
        return transitions

    def _after_claim(self, claims: list[Arrival], claimed: list[Claimed]) -> list[Transition]:
        transitions = []
        for arrival, claim in zip(claims, claimed, strict=True):
            if not claim.ok:
                logger.info(
                    "job %s: a stale or doubled message of attempt %s is dropped", claim.job, claim.token
                )
                continue
            holding = Holding(
                claim.job,
                claim.token,
                arrival.request,
                arrival.nonce,
                claim.admitted_ms or 0,
                claim.started_ms or 0,
                claim.losses,
            )
            self._holdings.add(holding)
            transitions.append(running(self._identity, holding, claim.entry))
            self._start_job(arrival.message)
        return transitions

    def _transition(self, holding: Holding, state: str, end: Ended, entry: str, now: int) -> Transition:
        back = state in ("waiting", "scheduled", "accepted")
        epoch, _, attempt = holding.token.partition(".")
        return Transition(
            job=holding.job,
            epoch=int(epoch),
            attempt=int(attempt),
            state=state,
            step=Step.BACK if back else Step.ENDED,
            worker=self._identity.name,
            incarnation=self._identity.incarnation,
            admitted_ms=holding.admitted_ms,
            started_ms=holding.started_ms,
            at_ms=now,
            losses=holding.losses + (end.outcome == "lost"),
            outcome=end.outcome,
            error=end.error or "",
            entry=entry,
        )


def running(identity: Identity, holding: Holding, entry: str = "") -> Transition:
    """That an attempt runs on this worker."""
    epoch, _, attempt = holding.token.partition(".")
    return Transition(
        job=holding.job,
        epoch=int(epoch),
        attempt=int(attempt),
        state="running",
        step=Step.RUNNING,
        worker=identity.name,
        incarnation=identity.incarnation,
        admitted_ms=holding.admitted_ms,
        started_ms=holding.started_ms,
        at_ms=holding.started_ms,
        losses=holding.losses,
        entry=entry,
    )
