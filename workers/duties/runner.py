"""The one runner of all duties: a thread of a worker, with a turn for each interval that one worker gets."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from celery import Celery
from redis.exceptions import RedisError
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from routing import native, roster
from routing.errors import PlatformError
from routing.postgres import is_locked
from routing.replies import LedgerClosed
from routing.settings import Settings
from workers import ticks
from workers.duties import due, fallback, keys, lapse, outbox, reconciling, replaced, retention, stream, sweep
from workers.duties.listening import Listener
from workers.duties.opening import open_ledger
from workers.stores import Stores
from workers.wake import Wake

logger = logging.getLogger(__name__)

#: Part of an interval for which a turn is taken: the next one may be a little early, never a whole interval late.
TURN_PART: Final = 0.9


@dataclass(frozen=True, slots=True)
class Duty:
    """`interval` in seconds by the settings; `tick`: the message that asks for it (beat's, or a worker's own);
    `without`: what runs in its place while Postgres decides."""

    name: str
    interval: Callable[[Settings], float]
    run: Callable[..., Mapping[str, int]]
    tick: str | None = None
    without: Callable[..., Mapping[str, int]] | None = None


#: What a worker's own thread says when it left something to be delivered.
OUTBOX: Final = "outbox"
#: The first of the advisory locks under which a duty runs while Postgres decides.
DUTY_LOCK: Final = 0x_CE1E_0100

DUTIES: Final = (
    Duty("due", lambda s: s.due_interval, due.run_once, without=fallback.expire),
    Duty("stream", lambda s: s.due_interval, stream.run_once),
    Duty("outbox", lambda s: s.due_interval, outbox.run_once, OUTBOX, outbox.run_once),
    Duty("lapse", lambda s: s.due_interval, lapse.run_once, without=fallback.lapse),
    Duty("sweep", sweep.pause, sweep.run_once, ticks.SWEEP),
    Duty("reconcile", lambda s: s.reconcile_interval, reconciling.run_once, ticks.RECONCILE),
    Duty("retention", lambda s: s.sweep_interval, retention.run_once, without=retention.run_once),
    Duty("replaced", sweep.pause, replaced.run_once, without=replaced.run_once),
    Duty("keys", lambda s: s.sweep_interval, keys.run_once, without=keys.run_once),
)

#: The same as the reconcile, out of its turn: asked for by whoever met a ledger that misses what it should have. One
#: for each sweep, however many suspect.
SUSPICION: Final = Duty("suspicion", sweep.pause, reconciling.run_once)


class Runner(native.Thread):
    """Runs each duty when its turn is free. What a store refuses is tried again in the next interval."""

    def __init__(self, app: Celery, stores: Stores, incarnation: str) -> None:
        super().__init__(name="duties", daemon=True)
        self._app = app
        self._listener = Listener(stores.apart(), incarnation)
        # With a handle of the ledger of their own: its epoch is the one in which duties may act.
        self._stores = stores.apart()
        self._incarnation = incarnation
        self._wake = Wake()
        self._stopping = False
        self._window = lapse.Window()
        self._looked_at = time.monotonic()
        self._asked: set[str] = set()
        self._suspected = False
        self._said = ""

    def start(self) -> None:
        super().start()
        self._listener.start()

    def tick(self, name: str) -> None:
        """Beat asks for a duty, in any thread."""
        self._asked.add(name)
        self._wake.set()

    def suspect(self) -> None:
        """The ledger misses what it should have (keys were deleted, say): it is compared with Postgres at once. In any
        thread."""
        self._suspected = True
        self._wake.set()

    def stop(self, within: float) -> None:
        self._stopping = True
        self._wake.set()
        self._listener.stop(within)
        if self.is_alive():
            self.join(within)

    def run(self) -> None:
        settings = self._stores.settings
        # The first reconcile is due an interval after the start, not at it.
        next_at = {
            duty.name: time.monotonic() + (duty.interval(settings) if duty.tick else 0.0) for duty in DUTIES
        }
        while not self._stopping:
            self._wake.wait(max(0.0, min(next_at.values()) - time.monotonic()))
            asked, self._asked = self._asked, set()
            now = time.monotonic()
            due_now = [duty for duty in DUTIES if now >= next_at[duty.name] or duty.tick in asked]
            for duty in due_now:
                next_at[duty.name] = now + duty.interval(settings)
            if self._suspected:
                due_now.append(SUSPICION)
            if due_now and not self._stopping:
                self._run(due_now)

    def _run(self, due_now: list[Duty]) -> None:
        if time.monotonic() - self._looked_at > self._stores.settings.renew_interval:
            # Held up for so long (by a store, by the machine) that heartbeats may have gone unseen.
            self._window.restart()
        try:
            with self._stores.engine.connect() as connection:
                known = roster.read_authority(connection)
            if known.authority == "postgres":
                self._run_without_ledger(due_now)
            else:
                self._run_with_ledger(due_now)
            self._said = ""
        except (PlatformError, LedgerClosed, RedisError, SQLAlchemyError) as error:
            self._window.restart()
            said = f"duties wait for a store: {type(error).__name__}: {error}"
            if said != self._said:
                self._said = said
                logger.warning(said)
        except Exception:
            logger.exception("a duty failed; it runs again in its next interval")
        self._looked_at = time.monotonic()

    def _run_with_ledger(self, due_now: list[Duty]) -> None:
        open_ledger(self._stores)
        mine = [duty for duty in due_now if self._turn(duty)]
        # One whose turn is not free yet is kept: what the last one compared may have been right then.
        self._suspected &= SUSPICION not in mine
        if mine:
            # Whoever repairs the books must be of the epoch that Postgres names now.
            with self._stores.engine.connect() as connection:
                known = roster.read_authority(connection)
            if known.authority != "ledger":
                # It changed while the ledger was waited for.
                return
            self._stores.ledger.epoch = known.epoch
        for duty in mine:
            try:
                self._run_one(duty, duty.run)
            except (PlatformError, SQLAlchemyError) as error:
                if not is_locked(error):
                    raise
                # The other duties need not wait for whoever has the lock.
                logger.warning("duty %s: what it needs is locked: %s", duty.name, error)

    def _run_without_ledger(self, due_now: list[Duty]) -> None:
        """One worker at a time: whoever has the lock of the duty."""
        for number, duty in enumerate(DUTIES):
            if duty.without is None or duty not in due_now:
                continue
            lock = {"key": DUTY_LOCK + number}
            with self._stores.engine.connect() as connection:
                if connection.execute(text("SELECT pg_try_advisory_lock(:key)"), lock).scalar_one():
                    try:
                        self._run_one(duty, duty.without)
                    finally:
                        connection.execute(text("SELECT pg_advisory_unlock(:key)"), lock)

    def _run_one(self, duty: Duty, run: Callable[..., Mapping[str, int]]) -> None:
        if duty.name == "lapse":
            run = partial(run, window=self._window)
        counts: dict[str, Any] = {
            name: number for name, number in run(self._app, self._stores).items() if number
        }
        if counts:
            logger.info(
                "duty %s: %s", duty.name, ", ".join(f"{name} {number}" for name, number in counts.items())
            )

    def _turn(self, duty: Duty) -> bool:
        """One worker in each interval: whoever sets the key, which expires."""
        milliseconds = max(1, round(duty.interval(self._stores.settings) * TURN_PART * 1000))
        return self._stores.ledger.take_turn(duty.name, self._incarnation, milliseconds)
