"""The thread of a worker that stands for election as the runner of the duties, and renews the lease while it is.

The holder renews its lease three times in each term, beside the duties, however long they take. Every other worker
looks once in a term whether the lease is free, so a successor is there within two terms. A request for a duty by
another worker travels with that worker's look, and comes to the runner with a renewal.

Between two looks the thread hears the news that concern all workers (`workers.membership.epoch_watch`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Final

from redis.exceptions import RedisError
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from celery_capacity.routing.errors import PlatformError
from celery_capacity.routing.lasting_warning import LastingWarning
from celery_capacity.routing.ledger import election
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.ledger.election import Elected
from celery_capacity.routing.model.states import Store
from celery_capacity.workers.membership.epoch_watch import EpochWatch
from celery_capacity.workers.process.service import LookingService
from celery_capacity.workers.supervision.window import Window

logger = logging.getLogger(__name__)

#: Renewals in one term: two may be lost.
RENEWALS: Final = 3


class Candidate(LookingService):
    """Thread that stands for election.

    `authority` says which store decides, and so which store keeps the lease. `on_change` is called when this worker won
    or lost the election, `on_asked` with the duties that other workers asked for. Any handle of the ledger will do.
    """

    def __init__(
        self,
        engine: Engine,
        ledger: Ledger,
        incarnation: str,
        authority: Callable[[], Store | None],
        on_change: Callable[[], None],
        on_asked: Callable[[Sequence[str]], None],
    ) -> None:
        super().__init__("election")
        self._engine = engine
        self.ledger = ledger
        self._incarnation = incarnation
        self._authority = authority
        self._on_change = on_change
        self._on_asked = on_asked
        #: Name of the caller's worker, "" for none: the ledger is asked whether it has a book of it.
        self.worker = ""
        #: Called with each answer of the ledger, None where it gave none.
        self.on_look: Callable[[Elected | None], None] = lambda _: None
        #: Subscription that this thread waits at.
        self.news: EpochWatch | None = None
        self._term = ledger.settings.runner_term
        #: Time for which the store of the heartbeats could be read without a gap.
        self.window = Window(max(ledger.settings.renew_interval, 2 * self._term))
        #: Store that keeps the lease, its fence (0: no lease), and the time at which it runs out (monotonic).
        self._store: Store | None = None
        self._fence = 0
        self._until = 0.0
        self._asks: set[str] = set()
        self._warning = LastingWarning(logger)

    def holds(self, store: Store | None = None) -> bool:
        """Return True if this worker is the runner now, by the lease of that store.

        False as soon as the lease may have run out, by this machine's own clock: also after the process was stopped.
        """
        return bool(self._fence) and time.monotonic() < self._until and store in (None, self._store)

    def ask(self, duty: str) -> None:
        """Have the runner do a duty soon; in any thread."""
        self._asks.add(duty)
        self._wake.set()

    def run(self) -> None:
        while not self._stopping:
            answered = False
            try:
                self._stand()
                self._warning.over()
                answered = True
            except (PlatformError, RedisError, SQLAlchemyError) as error:
                self.window.restart()
                if self._store != Store.POSTGRES:
                    self.on_look(None)
                self._warning.warn(f"the election of the runner waits for a store: {type(error).__name__}: {error}")
            except Exception:
                logger.exception("the election of the runner failed; it is held again")
            self._wait(self._term / RENEWALS if self._fence else self._term, answered=answered)
        self._resign()
        if self.news is not None:
            self.news.close()

    def _wait(self, seconds: float, *, answered: bool) -> None:
        if self._store != "postgres" and not answered:
            # Soon after the ledger is back, its news are heard again.
            seconds = min(seconds, self.ledger.settings.due_interval)
        if self.news is None:
            self._wake.wait(seconds)
        else:
            self.news.wait(self._wake, seconds, answers=answered and self._store != "postgres", runs=bool(self._fence))

    def _stand(self) -> None:
        store = self._authority() or Store.LEDGER
        if store != self._store:
            self._store = store
            self._lost()
        asks, sent = tuple(self._asks), time.monotonic()
        elected = self._elect(asks)
        self._asks.difference_update(asks)
        self.window.saw()
        if not elected.fence:
            self._lost()
            return
        held, previous, self._fence, self._until = self.holds(), self._fence, elected.fence, sent + self._term
        if elected.fence != previous:
            logger.info("this worker runs the duties, by lease %d of the %s", self._fence, store)
        if elected.fence != previous or not held:
            # A late renewal counts as a change too, though nobody else had taken over.
            self._on_change()
        if elected.asked:
            self._on_asked(elected.asked)

    def _elect(self, asks: Sequence[str]) -> Elected:
        if self._store != Store.POSTGRES:
            elected = self.ledger.elect(self._incarnation, self._fence, self._term, asks, self.worker)
            self.on_look(elected)
            return elected
        with self._engine.connect() as connection:
            return election.elect(connection, self._incarnation, self._fence, self._term)

    def _lost(self) -> None:
        if self._fence:
            logger.warning("this worker runs the duties no more: another one does, or will")
            self._fence = 0
            self._on_change()

    def _resign(self) -> None:
        if not self._fence:
            return
        try:
            if self._store == Store.POSTGRES:
                with self._engine.connect() as connection:
                    election.resign(connection, self._incarnation, self._fence)
            else:
                self.ledger.elect(self._incarnation, self._fence, 0.0, worker=self.worker)
        except (PlatformError, RedisError, SQLAlchemyError) as error:
            logger.info("the lease of the runner was not given back, it runs out: %s", error)
        self._fence = 0
