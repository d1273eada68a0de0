"""The confirmation that this process may decide: Postgres said so less than ten seconds ago.

A thread of its own asks, since a Postgres that hangs must not hold up a heartbeat. The thread rests while this worker
has nothing to decide. Then the answer runs out, and a caller that has something to claim asks first (`needed`). A
heartbeat that is written to Postgres brings an answer too.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import datetime
from typing import Final

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from celery_capacity.routing.database.authority import Authority, change_pause, read_authority
from celery_capacity.routing.errors import PlatformError
from celery_capacity.routing.lasting_warning import LastingWarning
from celery_capacity.routing.model.states import Store
from celery_capacity.workers.process.service import LookingService

logger = logging.getLogger(__name__)

#: Most seconds for which the thread rests: heartbeats bring answers more often.
REST: Final = 300.0


class Confirmation(LookingService):
    """Thread that asks Postgres which store decides, and in which epoch.

    Any thread may read the answer without a lock, since each assignment is of a single value. `on_regained` is called
    in this thread when the answer is valid again after it was not.
    """

    def __init__(self, engine: Engine, interval: float, on_regained: Callable[[], None]) -> None:
        super().__init__("confirmation")
        self._engine = engine
        self._interval = interval
        self._on_regained = on_regained
        self._valid_until = 0.0
        #: Last change of authority that was seen.
        self._changed: datetime | None = None
        #: Time from which the new authority may decide (monotonic).
        self._decides_from = 0.0
        self._resting = False
        self._warning = LastingWarning(logger)
        #: Says that this worker has nothing to decide.
        self.idle: Callable[[], bool] = lambda: False
        #: Called when Postgres names another epoch than before.
        self.on_epoch: Callable[[], None] = lambda: None
        #: Called when Postgres names another authority than before.
        self.on_authority: Callable[[], None] = lambda: None
        #: The epoch that Postgres named last; 0 before the first answer.
        self.epoch = 0
        #: The store that Postgres named last; None before the first answer.
        self.authority: Store | None = None

    @property
    def may_admit(self) -> bool:
        """Return True if this process may admit and claim through the ledger now."""
        return self.authority == Store.LEDGER and self._may_decide()

    @property
    def may_pull(self) -> bool:
        """Return True if this process may take jobs from Postgres now."""
        return self.authority == Store.POSTGRES and self._may_decide()

    def _may_decide(self) -> bool:
        return self._decides_from <= time.monotonic() < self._valid_until

    def ask(self) -> int:
        """Ask Postgres now, in the caller's thread; return the epoch."""
        asked = time.monotonic()
        with self._engine.connect() as connection:
            answer = read_authority(connection)
        lost = self._valid_until and not self.may_admit
        self.hear(asked, answer)
        if lost and self.may_admit:
            self._on_regained()
        return answer.epoch

    def hear(self, asked: float, answer: Authority) -> None:
        """Take an answer of Postgres to a question that was sent at `asked` (monotonic)."""
        if answer.changed != self._changed:
            # Nobody decides before all earlier answers to other processes have run out. The pause is counted once, by
            # this process's own clock, since the clock of Postgres may be set meanwhile.
            self._decides_from = time.monotonic() + max(0.0, change_pause(self._interval) - answer.age)
            self._changed = answer.changed
        before, self.epoch = self.epoch, answer.epoch
        authority, self.authority = self.authority, answer.authority
        self._valid_until = asked + change_pause(self._interval)
        if before not in (0, self.epoch):
            self.on_epoch()
        if authority != self.authority:
            self.on_authority()

    def needed(self) -> None:
        """Ask at once if the thread rests, since there is something to decide; in any thread. The call is cheap."""
        if self._resting:
            self._wake.set()

    @property
    def resting(self) -> bool:
        """Return True if there has been nothing to decide here for a while."""
        return self._resting

    def ask_soon(self) -> None:
        """Have this thread ask now, without waiting for it."""
        self._wake.set()

    def stop(self, within: float) -> bool:
        """End this thread without waiting for it: it is a daemon, and may be waiting for Postgres."""
        return super().stop(0.0)

    def run(self) -> None:
        while True:
            # The order matters: a caller that comes between the two lines sees a resting thread, and wakes it.
            self._resting = True
            self._resting = self.authority == Store.LEDGER and self.idle()
            self._wake.wait(REST if self._resting else self._interval)
            self._resting = False
            if self._stopping:
                return
            try:
                self.ask()
                self._warning.over()
            except (SQLAlchemyError, PlatformError) as error:
                self._warning.warn(f"Postgres does not confirm that this worker may admit: {type(error).__name__}")
            except Exception:
                logger.exception("a confirmation failed; the next one is asked for")
