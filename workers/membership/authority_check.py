"""The confirmation that this process may decide: Postgres said so less than ten seconds ago.

A thread of its own asks, since a Postgres that hangs must not hold up a heartbeat. It rests while this worker has
nothing to decide: then the answer runs out, and whoever has something to claim asks first (`needed`). A heartbeat that
is written to Postgres brings an answer too.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import datetime
from typing import Final

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from celery_capacity.routing import os_threads
from celery_capacity.routing.database.authority import Authority, change_pause, read_authority
from celery_capacity.routing.errors import PlatformError
from celery_capacity.routing.wake import Wake

logger = logging.getLogger(__name__)

#: Seconds for which the thread rests at the most: heartbeats bring answers more often.
REST: Final = 300.0


class Confirmation(os_threads.Thread):
    """One thread asks, all read: assignments of one value each. `on_regained` is called in this thread when the answer
    is valid again after it was not."""

    def __init__(self, engine: Engine, interval: float, on_regained: Callable[[], None]) -> None:
        super().__init__(name="confirmation", daemon=True)
        self._engine = engine
        self._interval = interval
        self._on_regained = on_regained
        self._valid_until = 0.0
        #: The change of authority that was seen last, and when what it made may decide (monotonic).
        self._changed: datetime | None = None
        self._decides_from = 0.0
        self._wake = Wake()
        self._stopping = False
        self._resting = False
        self._said = ""
        #: Whether this worker has nothing to decide.
        self.idle: Callable[[], bool] = lambda: False
        #: Called when Postgres names another epoch than before.
        self.on_epoch: Callable[[], None] = lambda: None
        #: The epoch that Postgres named last; 0 before the first answer.
        self.epoch = 0
        self.authority = ""

    @property
    def may_admit(self) -> bool:
        """Whether this process may admit and claim through the ledger now."""
        return self.authority == "ledger" and self._may_decide()

    @property
    def may_pull(self) -> bool:
        """Whether this process may take jobs from Postgres now."""
        return self.authority == "postgres" and self._may_decide()

    def _may_decide(self) -> bool:
        return self._decides_from <= time.monotonic() < self._valid_until

    def ask(self) -> int:
        """Ask now, in the caller's thread; returns the epoch."""
        asked = time.monotonic()
        with self._engine.connect() as connection:
            answer = read_authority(connection)
        lost = self._valid_until and not self.may_admit
        self.hear(asked, answer)
        if lost and self.may_admit:
            self._on_regained()
        return answer.epoch

    def hear(self, asked: float, answer: Authority) -> None:
        """Take an answer of Postgres to a question that was sent then (monotonic)."""
        if answer.changed != self._changed:
            # Nobody decides before all that others were told earlier has run out. Counted once, by this process's own
            # clock: that of Postgres may be set meanwhile.
            self._decides_from = time.monotonic() + max(0.0, change_pause(self._interval) - answer.age)
            self._changed = answer.changed
        before, self.epoch, self.authority = self.epoch, answer.epoch, answer.authority
        self._valid_until = asked + change_pause(self._interval)
        if before not in (0, self.epoch):
            self.on_epoch()

    def needed(self) -> None:
        """There is something to decide: ask at once, if the thread rests. In any thread, and cheap."""
        if self._resting:
            self._wake.set()

    @property
    def resting(self) -> bool:
        """Return whether there is nothing to decide here, for a while now."""
        return self._resting

    def ask_soon(self) -> None:
        """Ask in the thread, without waiting for it."""
        self._wake.set()

    def stop(self) -> None:
        """It may be waiting for Postgres: it is a daemon, and nobody waits for it."""
        self._stopping = True
        self._wake.set()

    def run(self) -> None:
        while True:
            # (In this order: whoever comes between the two finds it resting, and wakes it.)
            self._resting = True
            self._resting = self.authority == "ledger" and self.idle()
            self._wake.wait(REST if self._resting else self._interval)
            self._resting = False
            if self._stopping:
                return
            try:
                self.ask()
                self._said = ""
            except (SQLAlchemyError, PlatformError) as error:
                problem = f"Postgres does not confirm that this worker may admit: {type(error).__name__}"
                if problem != self._said:
                    self._said = problem
                    logger.warning(problem)
            except Exception:
                logger.exception("a confirmation failed; the next one is asked for")
