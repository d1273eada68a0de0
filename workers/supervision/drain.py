"""The worker's side of `celery -A platform drain`: break off what still runs at the deadline, and end once it is empty.

The cordon itself is the stores' matter: they admit nothing more. The worker hears of its cordon from the ledger's
channel, and looks when it starts. It lets its jobs end. At the deadline it breaks off the others, which go back and
start on other workers. Such an attempt does not count as lost. Then the worker stays, empty, until it is uncordoned.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Final

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from celery_capacity.routing.lasting_warning import LastingWarning
from celery_capacity.routing.store import controls
from celery_capacity.routing.store.controls import Cordon
from celery_capacity.workers.process.service import OnDemandLookingService

logger = logging.getLogger(__name__)

#: Seconds after TERM at which the process of a job that is broken off gets KILL.
KILL_AFTER: Final = 5.0
#: Looks in a row that find nothing, after which a worker is empty, and seconds between two of them. A job that was
#: admitted just before the cordon is still on its way at the first look.
LOOKS: Final = 2
AGAIN_AFTER: Final = 0.25


class Drain(OnDemandLookingService):
    """Thread that lets a worker become empty, while an operator drains it. Else there is no such thread.

    `interval`: seconds between two looks. `held` returns the attempts that run here. `break_off` breaks them off by a
    signal, and returns False where the pool cannot. `end` ends the worker: at once with True, else as after a TERM.
    """

    def __init__(
        self,
        engine: Engine,
        worker: str,
        interval: float,
        held: Callable[[], Sequence[object]],
        break_off: Callable[[str], bool],
        end: Callable[[bool], None],
    ) -> None:
        super().__init__("drain")
        self._engine = engine
        self._worker = worker
        self._interval = interval
        self._held = held
        self._break_off = break_off
        self._end = end
        #: True if the cordon of this worker is to be read.
        self._asked = True
        #: True while an operator drains this worker, and it is not empty yet.
        self._drains = False
        #: True if the last look found jobs; the number of looks since then.
        self._busy = False
        self._empty_looks = 0
        #: Time of the first signal to the jobs that run (monotonic), 0 before it.
        self._broken_off_at = 0.0
        #: True once the log says that this worker is empty, and that its pool cannot break off bodies.
        self._empty_told = self._cannot_told = False
        self._warning = LastingWarning(logger)

    def look(self) -> None:
        """Have the cordon of this worker read; in any thread."""
        self._asked = True
        self.wake()

    def _has_work(self) -> bool:
        return self._asked or self._drains

    def run(self) -> None:
        while not self._stopping:
            if not self._has_work() and self._ends():
                return
            pause = self._interval
            try:
                pause = self._step()
                self._warning.over()
            except SQLAlchemyError as error:
                self._asked = True
                self._warning.warn(f"drain: Postgres does not answer: {type(error).__name__}")
            except Exception:
                logger.exception("a drain failed; the next look tries again")
            if self._has_work():
                self._wake.wait(pause)

    def _step(self) -> float:
        """Read the cordon, and act on it; return the seconds until the next look."""
        self._asked = False
        with self._engine.connect() as connection:
            cordon, remaining = controls.cordon_of(connection, self._worker)
            busy = bool(self._held()) or controls.holds(connection, self._worker)
        if cordon is None or not cordon.drains:
            self._drains, self._broken_off_at = False, 0.0
            self._busy, self._empty_looks = False, 0
            self._empty_told = self._cannot_told = False
            return self._interval
        if busy and not self._busy:
            logger.warning("draining, as %s asked%s", cordon.by, f": {cordon.reason}" if cordon.reason else "")
        self._busy, self._empty_looks = busy, 0 if busy else self._empty_looks + 1
        self._drains = self._empty_looks < LOOKS
        if not self._drains:
            self._empty(cordon)
        elif not busy:
            return min(self._interval, AGAIN_AFTER)
        elif remaining is not None and remaining <= 0:
            self._hand_back(cordon)
        elif remaining is not None:
            return min(self._interval, remaining)
        return self._interval

    def _empty(self, cordon: Cordon) -> None:
        if not cordon.stops:
            if not self._empty_told:
                self._empty_told = True
                logger.warning("drained: this worker is empty, and nothing is admitted to it until `uncordon`")
            return
        self._note_stop()
        logger.warning("drained: this worker ends, as %s asked", cordon.by)
        self._end(False)

    def _hand_back(self, cordon: Cordon) -> None:
        """Break off what still runs. A process that ignores TERM gets KILL."""
        now = time.monotonic()
        signal = "KILL" if self._broken_off_at and now >= self._broken_off_at + KILL_AFTER else "TERM"
        self._broken_off_at = self._broken_off_at or now
        if self._break_off(signal):
            return
        if cordon.stops:
            self._note_stop()
            logger.warning("the deadline of the drain is over: jobs that still run are broken off and handed back")
            self._end(True)
        elif not self._cannot_told:
            self._cannot_told = True
            logger.warning("the deadline of the drain is over; jobs go on, since this pool cannot break them off")

    def _note_stop(self) -> None:
        """Forget that the process is to end: one that its supervisor starts again stays, empty."""
        with self._engine.connect() as connection:
            controls.note_stop(connection, self._worker)
