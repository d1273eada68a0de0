"""The confirmation that this process may decide: Postgres said so less than ten seconds ago.

A thread of its own asks, since a Postgres that hangs must not hold up a heartbeat.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import datetime

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from routing import native, roster
from routing.errors import PlatformError
from workers.wake import Wake

logger = logging.getLogger(__name__)

class Confirmation(native.Thread):
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
        self._said = ""
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
            answer = roster.read_authority(connection)
        lost = self._valid_until and not self.may_admit
        if answer.changed != self._changed:
            # Nobody decides before all that others were told earlier has run out. Counted once, by this process's own
            # clock: that of Postgres may be set meanwhile.
            self._decides_from = time.monotonic() + max(0.0, roster.pause(self._interval) - answer.age)
            self._changed = answer.changed
        self.epoch, self.authority = answer.epoch, answer.authority
        self._valid_until = asked + roster.pause(self._interval)
        if lost and self.may_admit:
            self._on_regained()
        return answer.epoch

    def ask_soon(self) -> None:
        """Ask in the thread, without waiting for it."""
        self._wake.set()

    def stop(self) -> None:
        """It may be waiting for Postgres: it is a daemon, and nobody waits for it."""
        self._stopping = True
        self._wake.set()

    def run(self) -> None:
        while True:
            self._wake.wait(self._interval)
            if self._stopping:
                return
            try:
                self.ask()
                self._said = ""
            except (SQLAlchemyError, PlatformError) as error:
                said = f"Postgres does not confirm that this worker may admit: {type(error).__name__}"
                if said != self._said:
                    self._said = said
                    logger.warning(said)
            except Exception:
                logger.exception("a confirmation failed; the next one is asked for")
