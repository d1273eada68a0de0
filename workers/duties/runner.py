"""The one runner of all duties: a thread of a worker, with a turn for each interval that one worker gets."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from celery import Celery
from redis.exceptions import RedisError
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from routing import deadlines, native, roster
from routing.errors import PlatformError
from routing.postgres import is_locked, told
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
#: Doublings of the pause after which a duty that failed is tried again; it is at most its interval.
MOST_DOUBLINGS: Final = 6
#: What is said to fail where no duty could begin.
STORES: Final = "duties"


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
    # First what the ledger knows and Postgres does not: by their rows the others judge what to bring in.
    Duty("stream", lambda s: s.due_interval, stream.run_once),
    Duty("due", lambda s: s.due_interval, due.run_once, without=fallback.expire),
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
    """Runs each duty when its turn is free. Each stands alone: one that fails is tried again after a pause of its own,
    and the others are done."""

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
        #: When each duty is due (monotonic), its failures in a row, and what was said of the last one.
        self._next_at: dict[str, float] = {}
        self._failures: dict[str, int] = {}
        self._said: dict[str, str] = {}

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
        with deadlines.patiently(self._stores.settings.store_timeout * deadlines.LONG):
            self._loop()

    def _loop(self) -> None:
        settings = self._stores.settings
        # The first reconcile is due an interval after the start, not at it.
        self._next_at = {
            duty.name: time.monotonic() + (duty.interval(settings) if duty.tick else 0.0) for duty in DUTIES
        }
        while not self._stopping:
            self._wake.wait(max(0.0, min(self._next_at.values()) - time.monotonic()))
            asked, self._asked = self._asked, set()
            now = time.monotonic()
            due_now = [duty for duty in DUTIES if now >= self._next_at[duty.name] or duty.tick in asked]
            for duty in due_now:
                self._next_at[duty.name] = now + duty.interval(settings)
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
            self._said.pop(STORES, None)
        except Exception as error:
            self._window.restart()
            for duty in due_now:
                self._try_soon(duty)
            self._say(STORES, error)
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
            self._run_one(duty, duty.run)

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
        """Do one duty. One that fails concerns no other: it is tried again after a pause of its own."""
        more = {"window": self._window} if duty.name == "lapse" else {}
        try:
            found = run(self._app, self._stores, **more)
        except Exception as error:
            self._failures[duty.name] = self._failures.get(duty.name, 0) + 1
            self._try_soon(duty)
            self._say(f"duty {duty.name}", error)
            # LOST counts only time in which heartbeats could be read.
            if _lies_in(RedisError if run is duty.run else SQLAlchemyError, error):
                self._window.restart()
            return
        self._failures.pop(duty.name, None)
        self._said.pop(f"duty {duty.name}", None)
        counts = {name: number for name, number in found.items() if number}
        if counts:
            logger.info(
                "duty %s: %s", duty.name, ", ".join(f"{name} {number}" for name, number in counts.items())
            )

    def _try_soon(self, duty: Duty) -> None:
        """Not at its next interval, which may be long, and not at once."""
        if duty.name in self._next_at:
            settings = self._stores.settings
            pause = settings.due_interval * 2 ** min(self._failures.get(duty.name, 0), MOST_DOUBLINGS)
            self._next_at[duty.name] = time.monotonic() + min(pause, duty.interval(settings))

    def _say(self, what: str, error: Exception) -> None:
        """Say what failed, once and not at every try."""
        why = told(error) if isinstance(error, DBAPIError) else str(error)
        said = f"{what} is tried again: {type(error).__name__}: {why}"
        if said == self._said.get(what):
            return
        self._said[what] = said
        passes = isinstance(error, (PlatformError, LedgerClosed, RedisError, SQLAlchemyError))
        logger.warning("%s", said, exc_info=None if passes else error)

    def _turn(self, duty: Duty) -> bool:
        """One worker in each interval: whoever sets the key, which expires."""
        milliseconds = max(1, round(duty.interval(self._stores.settings) * TURN_PART * 1000))
        return self._stores.ledger.take_turn(duty.name, self._incarnation, milliseconds)


def _lies_in(store: type[Exception], error: BaseException | None) -> bool:
    """Whether an error came of a store that could not be read. (One that keeps a row locked answers.)"""
    if is_locked(error):
        return False
    while error is not None:
        if isinstance(error, (store, LedgerClosed)):
            return True
        error = error.__cause__
    return False
