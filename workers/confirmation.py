"""The confirmation that this process may decide: Postgres said so less than ten seconds ago."""

from __future__ import annotations

import time
from typing import Final

from sqlalchemy import Engine

from routing import roster

#: Intervals for which an answer is valid, counted from the sending of the question (10 s at the usual 5).
VALID_INTERVALS: Final = 2.0


class Confirmation:
    """Asked by one thread, read by all: assignments of one value each."""

    def __init__(self, engine: Engine, interval: float) -> None:
        self._engine = engine
        self._valid_for = interval * VALID_INTERVALS
        self._valid_until = 0.0
        self.authority = ""

    def ask(self) -> int:
        """Ask Postgres; returns the epoch. What a new one means is the membership's to do."""
        asked = time.monotonic()
        with self._engine.connect() as connection:
            answer = roster.read_authority(connection)
        self.authority = answer.authority
        self._valid_until = asked + self._valid_for
        return answer.epoch

    @property
    def may_admit(self) -> bool:
        """Whether this process may admit and claim through the ledger now."""
        return self.authority == "ledger" and time.monotonic() < self._valid_until
