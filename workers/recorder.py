"""Writing outcomes to Postgres: in batches, from a thread of its own, so that nothing waits for the database.

Until they are written, transitions are in two places: here, and in the ledger's stream.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from routing import enroll, native, store, stream
from routing.errors import PlatformError
from routing.ledger import Ledger
from routing.replies import LedgerClosed
from routing.store import Applied, Transition

logger = logging.getLogger(__name__)

#: Seconds for which a batch is collected.
BATCH_WITHIN: Final = 0.02
#: Transitions written in one statement.
MOST: Final = 1000
#: Seconds between tries while Postgres does not answer.
RETRY_AFTER: Final = (0.1, 0.2, 0.5, 1.0, 2.0)


class Recorder(native.Thread):
    """`add` never blocks. `flush` waits until all that was added is written, or the time is over. `on_applied` is
    called with the rows that changed."""

    def __init__(
        self, engine: Engine, ledger: Ledger, on_applied: Callable[[Sequence[Applied]], None] = lambda _: None
    ) -> None:
        super().__init__(name="recorder", daemon=True)
        self._engine = engine
        self._ledger = ledger
        self._on_applied = on_applied
        self._pending: list[Transition] = []
        self._calls: list[Callable[[], object]] = []
        self._writing = False
        self._changed = threading.Condition()
        self._stopping = False

    def add(self, transitions: Sequence[Transition]) -> None:
        with self._changed:
            self._pending += transitions
            self._changed.notify_all()

    def call(self, action: Callable[[], object]) -> None:
        """Run something that may wait for a store, in this thread."""
        with self._changed:
            self._calls.append(action)
            self._changed.notify_all()

    def flush(self, within: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: not (self._pending or self._calls or self._writing), within)

    def stop(self, within: float) -> None:
        """Write what is pending, if Postgres takes it, and end."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self.is_alive():
            self.join(within)

    def run(self) -> None:
        failures = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._calls or self._stopping)
                if self._stopping and not (self._pending or self._calls):
                    return
                if self._pending and not self._stopping:
                    self._changed.wait_for(lambda: len(self._pending) >= MOST or self._stopping, BATCH_WITHIN)
                batch, self._pending = self._pending[:MOST], self._pending[MOST:]
                calls, self._calls = self._calls, []
                self._writing = True
            left = batch
            try:
                left = self._write(batch)
                for action in calls:
                    self._run(action)
            finally:
                with self._changed:
                    # In one step: whoever flushes must find what was not written here or there.
                    self._writing = False
                    self._pending = left + self._pending
                    self._changed.notify_all()
            if not left:
                failures = 0
                continue
            with self._changed:
                if self._stopping:
                    # The stream has them: whoever runs the duty writes them.
                    return
                self._changed.wait_for(
                    lambda: self._stopping, RETRY_AFTER[min(failures, len(RETRY_AFTER) - 1)]
                )
            failures += 1

    def _write(self, batch: list[Transition]) -> list[Transition]:
        """What is left of it: nothing, or what Postgres does not take now."""
        if not batch:
            return []
        try:
            applied, left = store.apply_unlocked(self._engine, batch)
        except SQLAlchemyError as error:
            logger.warning(
                "Postgres does not take %d outcomes, they are kept: %s", len(batch), error.__class__.__name__
            )
            return batch
        except Exception:
            # A transition that cannot be written at all must not end the thread that writes the others.
            logger.exception("%d outcomes cannot be written, they are kept", len(batch))
            return batch
        if left:
            logger.warning("the rows of %d outcomes are locked, they are kept", len(left))
        self._after([one for one in batch if one not in left], applied)
        return left

    def _after(self, batch: Sequence[Transition], applied: Sequence[Applied]) -> None:
        """Postgres has them. What fails from here on is repaired by the duties: entries are applied once more without
        effect, scheduled rows are found when they are due."""
        try:
            self._ledger.forget(stream.settled(batch))
            enroll.go_on(self._engine, self._ledger, applied)
            self._on_applied(applied)
        except (PlatformError, LedgerClosed, SQLAlchemyError) as error:
            logger.info("left to the duties: %s", error)

    def _run(self, action: Callable[[], object]) -> None:
        started = time.monotonic()
        try:
            action()
        except Exception:
            logger.exception(
                "a step after the end of a job failed (after %.1f s)", time.monotonic() - started
            )
