"""Reachability of the ledger, as a worker's heartbeat finds it, and the change of authority that follows.

A worker that lost the ledger says so in its row in Postgres. When all workers have lost it for long enough, the first
worker that looks lets Postgres decide. When all reach it again, the first that looks lets the ledger decide. Each
change is a single guarded statement.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final

from sqlalchemy import Connection, Engine

from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.database.authority import change_pause, decide_in_ledger, decide_in_postgres
from celery_capacity.routing.model.states import Store
from celery_capacity.workers.membership.authority_check import Confirmation

logger = logging.getLogger(__name__)

#: Due intervals for which the ledger must have answered without a gap before it may decide again (2 s at the usual 1).
STEADY_INTERVALS: Final = 2.0
#: Renew intervals after which a silent worker does not count: it need not reach the ledger for the ledger to decide.
SILENT_INTERVALS: Final = 3.0


class Reachability:
    """Reachability of the ledger. A single thread notes it, any thread reads it: each assignment is of one value."""

    def __init__(self) -> None:
        #: Time since which `lost` has its value (monotonic).
        self.since = time.monotonic()
        self.lost = False
        #: Called when the ledger's Redis does not answer in time. A refusal does not count.
        self.on_silence: Callable[[], None] = lambda: None
        #: Called when the ledger answers again.
        self.on_found: Callable[[], None] = lambda: None

    def note(self, lost: bool) -> None:
        if lost != self.lost:
            self.since = time.monotonic()
            self.lost = lost
            if not lost:
                self.on_found()

    def seconds(self) -> float:
        return time.monotonic() - self.since


class AuthoritySwitch:
    """Switch of the authority between the ledger and Postgres."""

    def __init__(
        self, engine: Engine, settings: Settings, confirmation: Confirmation, reachability: Reachability
    ) -> None:
        self._engine = engine
        self._settings = settings
        self._confirmation = confirmation
        self._reachability = reachability

    def look(self) -> None:
        """Change the authority if it is time. Asks Postgres only if this worker's own view speaks for a change."""
        settings, authority, reachability = self._settings, self._confirmation.authority, self._reachability
        lost_for = change_pause(settings.confirm_interval)
        if authority == Store.LEDGER and reachability.lost and reachability.seconds() >= lost_for:
            self._change(
                lambda connection: decide_in_postgres(connection, settings.worker_ttl, lost_for),
                "no worker reaches the ledger: Postgres decides, in epoch %d",
            )
        elif (
            authority == Store.POSTGRES
            and not reachability.lost
            and reachability.seconds() >= settings.due_interval * STEADY_INTERVALS
        ):
            seen_for = settings.renew_interval * SILENT_INTERVALS
            self._change(
                lambda connection: decide_in_ledger(connection, seen_for),
                "the ledger answers again: it decides, from epoch %d on",
            )

    def _change(self, change: Callable[[Connection], int | None], message: str) -> None:
        with self._engine.connect() as connection:
            epoch = change(connection)
        if epoch is not None:
            logger.warning(message, epoch)
            self._confirmation.ask_soon()
