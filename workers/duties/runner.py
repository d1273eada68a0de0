"""The one runner of all duties: a thread of a worker, with a turn for each interval that one worker gets."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from celery import Celery
from redis.exceptions import RedisError
from sqlalchemy.exc import SQLAlchemyError

from routing import keys, roster
from routing.errors import PlatformError
from routing.replies import LedgerClosed
from routing.settings import Settings
from workers import ticks
from workers.duties import due, lapse, reconciling, stream, sweep
from workers.duties.opening import open_ledger
from workers.stores import Stores
from workers.wake import Wake

logger = logging.getLogger(__name__)

#: Part of an interval for which a turn is taken: the next one may be a little early, never a whole interval late.
TURN_PART: Final = 0.9


@dataclass(frozen=True, slots=True)
class Duty:
    """`interval` in seconds by the settings; `tick`: beat's message that asks for it."""

    name: str
    interval: Callable[[Settings], float]
    run: Callable[..., Mapping[str, int]]
    tick: str | None = None


DUTIES: Final = (
    Duty("due", lambda s: s.due_interval, due.run_once),
    Duty("stream", lambda s: s.due_interval, stream.run_once),
    Duty("lapse", lambda s: s.due_interval, lapse.run_once),
    Duty("sweep", lambda s: s.sweep_interval, sweep.run_once, ticks.SWEEP),
    Duty("reconcile", lambda s: s.reconcile_interval, reconciling.run_once, ticks.RECONCILE),
)


class Runner(threading.Thread):
    """Runs each duty when its turn is free. What a store refuses is tried again in the next interval."""

    def __init__(self, app: Celery, stores: Stores, incarnation: str) -> None:
        super().__init__(name="duties", daemon=True)
        self._app = app
        self._stores = stores
        self._incarnation = incarnation
        self._wake = Wake()
        self._stopping = False
        self._window = lapse.Window()
        self._looked_at = time.monotonic()
        self._asked: set[str] = set()
        self._said = ""

    def tick(self, name: str) -> None:
        """Beat asks for a duty, in any thread."""
        self._asked.add(name)
        self._wake.set()

    def stop(self, within: float) -> None:
        self._stopping = True
        self._wake.set()
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
            if due_now and not self._stopping:
                self._run(due_now)

    def _run(self, due_now: list[Duty]) -> None:
        if time.monotonic() - self._looked_at > self._stores.settings.renew_interval:
            # Held up for so long (by a store, by the machine) that heartbeats may have gone unseen.
            self._window.restart()
        try:
            open_ledger(self._stores)
            mine = [duty for duty in due_now if self._turn(duty)]
            if mine:
                # Whoever repairs the books must be of the epoch that Postgres names now.
                with self._stores.engine.connect() as connection:
                    self._stores.ledger.epoch = roster.read_authority(connection).epoch
            for duty in mine:
                self._run_one(duty)
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

    def _run_one(self, duty: Duty) -> None:
        run = partial(duty.run, window=self._window) if duty.name == "lapse" else duty.run
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
        return bool(self._stores.redis.set(keys.duty(duty.name), self._incarnation, nx=True, px=milliseconds))
