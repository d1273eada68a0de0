"""The heartbeat of a worker: a thread of its own, outside the pool and the main loop, so that neither delays it.

It tells both stores that the worker lives, Postgres first. Neither store delays the other for long:

- Postgres has a part of the time from a renewal to the end of the lease. When it did not answer, it is left
  alone for a renew interval.
- Redis has the time-out of one answer. While it is lost, a quick look comes first, of a tenth of the store time-out.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import time
from collections.abc import Callable
from typing import Final

from redis.exceptions import RedisError
from sqlalchemy.exc import SQLAlchemyError

from celery_capacity.routing.config import timeouts
from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.database import deadlines
from celery_capacity.routing.errors import NameTaken, PlatformError, StoreUnavailable
from celery_capacity.routing.lasting_warning import LastingWarning
from celery_capacity.routing.ledger.election import Elected
from celery_capacity.routing.ledger.replies import LedgerClosed
from celery_capacity.routing.model.capacity import Capacity
from celery_capacity.routing.model.states import Store
from celery_capacity.workers.broker.cut_connection import is_silence
from celery_capacity.workers.membership.context import WorkerContext
from celery_capacity.workers.membership.failover import AuthoritySwitch
from celery_capacity.workers.membership.lifetime import drain_at_end
from celery_capacity.workers.membership.registration import Membership
from celery_capacity.workers.process.service import LookingService

logger = logging.getLogger(__name__)

#: Part of the due interval within which two ticks make a single heartbeat: beat's ticks come in pairs.
TICKS_SHARE: Final = 0.1
#: Part of the renew interval for which a heartbeat waits for the ledger's thread, which may have jobs that are in no
#: list yet. After that it renews the lease, and leaves the list to the next heartbeat.
WAITS_SHARE: Final = 0.5
#: Part of the time from a renewal to the end of the lease that Postgres may take.
POSTGRES_SHARE: Final = 0.5
#: Part of that time for this worker's notes to be written, before it says that it lost the ledger.
FLUSH_SHARE: Final = 0.5


class HeartbeatThread(LookingService):
    """Heartbeat thread: tells Postgres that the worker lives, renews its lease in the ledger, sees a new epoch, drains.

    It also looks which store is to decide (`AuthoritySwitch`).
    """

    def __init__(
        self,
        context: WorkerContext,
        membership: Membership,
        challenge: Callable[[], None],
        measure: Callable[[], Capacity],
        on_open: Callable[[], None],
        on_taken: Callable[[NameTaken], None],
    ) -> None:
        super().__init__("heartbeat")
        self._reachability = context.reachability
        self._ledger = context.ledger
        self._confirmation = context.confirmation
        self._membership = membership
        self._holdings = context.holdings
        self._recorder = context.recorder
        self._challenge = challenge
        self._measure = measure
        self._on_open = on_open
        self._on_taken = on_taken
        self._exclusive = context.exclusive
        self._ticked = False
        self._closed = False
        self._looks = False
        self._drain = False
        self._drained = False
        #: Times of the last renewal of the lease, and of the next one (monotonic).
        self._renewed_at = self._renew_at = 0.0
        self._switch = AuthoritySwitch(context.engine, context.settings, context.confirmation, context.reachability)
        self._postgres_within, self._postgres_from = postgres_within(self._ledger.settings), 0.0
        self._warning, self._postgres_warning = LastingWarning(logger), LastingWarning(logger)
        #: Called after each heartbeat.
        self.on_renewed: Callable[[], None] = lambda: None
        #: Times of the newest heartbeats that reached the ledger, and Postgres (monotonic).
        self._ledger_at = self._postgres_at = 0.0
        #: Time at which jobs that still run are to be handed back (monotonic).
        self._cold_at, self._is_cold = math.inf, False
        #: Called once at that time.
        self.on_cold: Callable[[], None] = end_cold
        #: End of the worker's life (monotonic), and the function that is called once then.
        self._ends_at = membership.lifetime.ends_at
        self.on_end: Callable[[], None] = drain_at_end
        #: Called after each look at the stores, whatever became of it, with `reached_at` and `draining`.
        self.on_look: Callable[[float, bool], None] = lambda *_: None
        #: Called when the ledger does not know this worker, though it is open in its epoch.
        self.on_missing: Callable[[], None] = lambda: None

    # -- called by others, in any thread or signal handler -------------------------------------------------------

    def tick(self) -> None:
        """Have a heartbeat made soon, for a tick of beat's or a challenge."""
        self._ticked = True
        self._wake.set()

    def closed(self) -> None:
        """Note that a caller met a ledger that is cold or of another epoch."""
        self._closed = True
        self._wake.set()

    def look(self) -> None:
        """Have this thread look at the ledger, which may be cold, of another epoch or away."""
        self._looks = True
        self._wake.set()

    def looked(self, elected: Elected | None) -> None:
        """Take the result of the election's look at the ledger, None where the ledger gave no answer."""
        if elected is None:
            self._reachability.note(lost=True)
        if elected is None or elected.epoch != self._ledger.epoch:
            self.look()
        elif not elected.has_book:
            self.tick()

    def drain(self) -> None:
        self._drain = True
        self._wake.set()

    def cold_in(self, seconds: float) -> None:
        """Have `on_cold` called in so many seconds, unless this thread ends before. A later signal puts off nothing."""
        if not self._is_cold:
            self._cold_at = min(self._cold_at, time.monotonic() + seconds)
            self._wake.set()

    # -- the thread ----------------------------------------------------------------------------------------------

    def run(self) -> None:
        settings = self._ledger.settings
        # This thread starts when the worker has registered with the store that decides.
        self._renewed_at = self._ledger_at = self._postgres_at = time.monotonic()
        self._renew_at = self._renewed_at + settings.renew_interval
        #: Fewest seconds to wait, so that a store that fails at once is not asked without a pause.
        pause = 0.0
        while not self._stopping:
            # An idle worker asks nothing between two heartbeats: the election looks, and wakes this thread.
            quiet = self._confirmation.resting and not (pause or self._closed)
            now = time.monotonic()
            first = min(self._renew_at, self._cold_at, self._ends_at)
            left = max(pause, min(first - now, self._postgres_due_in()))
            self._wake.wait(left if quiet else min(settings.due_interval, left))
            self._tell_postgres()
            now, pause = time.monotonic(), settings.due_interval
            try:
                self._tell_ledger(now, quiet=quiet)
                self._warning.over()
                self._note(lost=False)
                pause = 0.0
            except LedgerClosed:
                self._closed = True
                self._note(lost=False)
            except NameTaken as error:
                # This worker was silent for so long that another has its name: nothing is admitted here any more.
                self._on_taken(error)
                return
            except (StoreUnavailable, RedisError) as error:
                self._warning.warn(f"heartbeat: the ledger does not answer: {type(error).__name__}: {error}")
                self._note(lost=True, silent=is_silence(error))
                # The worker has the ledger again once it could renew its lease: a read-only ledger is of no use.
                self._renew_at = now
            except (SQLAlchemyError, PlatformError) as error:
                self._warning.warn(f"heartbeat: a store does not answer: {type(error).__name__}: {error}")
            except Exception:
                # No error may end this thread: a worker without a heartbeat loses its jobs.
                logger.exception("a heartbeat failed; the next one is tried")
            self._looked()

    @property
    def reached_at(self) -> float:
        """Return the time of the newest heartbeat that reached the store that decides (monotonic)."""
        return self._postgres_at if self._confirmation.authority == Store.POSTGRES else self._ledger_at

    def _looked(self) -> None:
        """Tell the system that runs this worker how it is, and begin the end of its life, or the cold end, in time."""
        try:
            if time.monotonic() >= self._cold_at:
                self._cold_at, self._is_cold = math.inf, True
                self.on_cold()
            if time.monotonic() >= self._ends_at:
                self._ends_at = math.inf
                self.on_end()
            self.on_look(self.reached_at, self._drain)
        except Exception:
            logger.exception("the health of this worker was not reported; the next heartbeat tries again")

    def _tell_ledger(self, now: float, *, quiet: bool) -> None:
        """Look at the ledger if that is due, then register anew, drain, or renew the lease."""
        settings = self._ledger.settings
        if self._ticked:
            self._ticked = False
            self._renew_at = min(self._renew_at, self._renewed_at + settings.due_interval * TICKS_SHARE)
        self._membership.draining |= self._drain
        if self._reachability.lost:
            self._ledger.ping()
        self._closed |= self._confirmation.epoch != self._ledger.epoch
        if not (quiet or self._closed) or self._looks:
            self._looks = False
            opened = self._ledger.opened()
            self._closed |= opened is None or opened[0] != self._ledger.epoch
        if self._closed:
            self._rejoin(self._ledger.opened())
            self._renew_at = now + settings.renew_interval
        elif self._drain and not self._drained:
            handed = self._membership.drain()
            self._drained = True
            if handed:
                logger.info("draining: %d jobs handed back", handed)
        elif now >= self._renew_at:
            self._renewed_at, self._renew_at = now, now + settings.renew_interval
            if not self._membership.draining:
                # A draining worker is not measured: the pool of a worker that stops has no size any more.
                self._membership.resize(self._measure(), self._holdings)
            if self._renew(settings.renew_interval * WAITS_SHARE):
                self._ledger_at = now
            else:
                self._rejoin(self._ledger.opened())
                self.on_missing()
            self.on_renewed()

    def _postgres_due_in(self) -> float:
        due_in = self._membership.postgres_due_in(self._reachability.lost)
        return max(due_in, self._postgres_from - time.monotonic())

    def _tell_postgres(self) -> None:
        """Tell Postgres that this worker lives, when it is time, and look which store is to decide.

        An error concerns the next try alone: the ledger has its heartbeat all the same.
        """
        settings, lost = self._ledger.settings, self._reachability.lost
        if self._stopping or time.monotonic() < self._postgres_from:
            return
        try:
            with deadlines.within(self._postgres_within):
                flush_within = self._postgres_within * FLUSH_SHARE
                if self._postgres_due_in() <= 0:
                    if self._membership.tell_postgres(lost, flush_within):
                        self._postgres_at = time.monotonic()
                    else:
                        self._postgres_from = time.monotonic() + settings.due_interval
                self._switch.look()
            self._postgres_warning.over()
            return
        except SQLAlchemyError as error:
            self._postgres_warning.warn(f"heartbeat: Postgres does not answer: {type(error).__name__}")
        except Exception:
            logger.exception("a heartbeat to Postgres failed; the next one is tried")
        # Without the ledger no lease in it can run out meanwhile.
        self._postgres_from = time.monotonic() + (settings.due_interval if lost else settings.renew_interval)

    def _note(self, *, lost: bool, silent: bool = False) -> None:
        """Note whether the ledger answers.

        The callbacks touch connections of Celery's, which Celery's own threads use at the same time. So no error of
        theirs may end this thread.
        """
        try:
            self._reachability.note(lost=lost)
            if silent:
                self._reachability.on_silence()
        except Exception:
            logger.exception("connections to the broker were not ended; they end by their own time-outs")

    def _renew(self, within: float) -> bool:
        """Renew the lease with the list of held jobs; return False if the ledger does not know this worker.

        Meanwhile the ledger's thread is kept from getting jobs that are in no list yet.
        """
        judged = self._exclusive.acquire(timeout=within)
        try:
            return self._membership.renew(self._holdings, missing_ms=None if judged else -1)
        finally:
            if judged:
                self._exclusive.release()

    def _rejoin(self, opened: tuple[int, str] | None) -> None:
        """Register again, once the ledger is open in the epoch that Postgres names."""
        if opened is None or self._ledger.is_cold() or self._confirmation.epoch != opened[0]:
            self._closed = True
            # A ledger that is read-only, or full, cannot be opened either.
            self._ledger.probe()
            if self._confirmation.authority != Store.POSTGRES:
                # Postgres has the last word, and is asked without being waited for.
                self._confirmation.ask_soon()
            return
        with self._exclusive:
            self._membership.rejoin(self._holdings, self._recorder, self._challenge)
        self._closed = False
        self._ledger_at = time.monotonic()
        self._on_open()


def end_cold() -> None:
    """Have this worker's process stop cold, as after a QUIT: running jobs are broken off and handed back.

    Celery's own handler does the work, in the main thread. The jobs start elsewhere at once, and no attempt counts as
    lost.
    """
    logger.warning("PLATFORM_SHUTDOWN_GRACE is over: jobs that still run are broken off and handed back")
    os.kill(os.getpid(), signal.SIGQUIT)


def postgres_within(settings: Settings) -> float:
    """Return the seconds that a heartbeat to Postgres may take, so that the lease in the ledger does not run out."""
    spare = settings.worker_ttl - settings.renew_interval
    return min(timeouts.ANSWER * settings.store_timeout, spare * POSTGRES_SHARE)
