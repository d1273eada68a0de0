"""The thread of a worker that runs the duties while this worker is elected (`workers.runner.candidate`).

Between two duties it looks whether its lease still holds, and stops if not. Other workers wait, and pass their requests
on to the runner.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from celery import Celery
from redis.exceptions import RedisError
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.database import deadlines
from celery_capacity.routing.database.authority import read_authority
from celery_capacity.routing.database.postgres_errors import is_locked, one_line
from celery_capacity.routing.errors import PlatformError
from celery_capacity.routing.lasting_warning import LastingWarning
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.ledger.replies import LedgerClosed
from celery_capacity.routing.model.states import Store
from celery_capacity.workers.broker import beat_messages, transport
from celery_capacity.workers.duties import (
    ageing,
    apply_transitions,
    controls,
    deliver_results,
    due,
    fallback,
    infeasible,
    lapse,
    reconcile,
    refill,
    replaced,
    reserve,
    sweep,
)
from celery_capacity.workers.learning import estimates, run_times
from celery_capacity.workers.membership.cold_ledger import open_ledger
from celery_capacity.workers.process.service import OnDemandLookingService
from celery_capacity.workers.process.spare_connections import close_spare
from celery_capacity.workers.process.stores import Stores
from celery_capacity.workers.retention import archive, audit, former_workers, unique_keys
from celery_capacity.workers.runner.candidate import Candidate
from celery_capacity.workers.runner.commit_listener import CommitListener

logger = logging.getLogger(__name__)


class Pass(StrEnum):
    """Result of a pass of a duty; `duty.<duty>.<result>` is the name of its counter."""

    #: it came to its end
    DONE = "done"
    #: it raised an error, and is tried again
    FAILED = "failed"
    #: Postgres decides, and the duty concerns the ledger alone
    SKIPPED = "skipped"
    #: it did not begin: the lease was lost before its turn, or a store did not answer
    LEFT = "left"


#: Most doublings of the pause after which a failed duty is retried. The pause is at most the duty's interval.
MAX_DOUBLINGS: Final = 6
#: Name in the log of a failure before any duty could begin.
STORES: Final = "duties"


@dataclass(frozen=True, slots=True)
class Duty:
    """A duty of the runner.

    `interval`: seconds, by the settings. `tick`: the message that asks for the duty, beat's or a worker's own.
    `without` runs in its place while Postgres decides. `rest`: seconds from a pass to the next one that is asked for.
    """

    name: str
    interval: Callable[[Settings], float]
    run: Callable[..., Mapping[str, int]]
    tick: str | None = None
    without: Callable[..., Mapping[str, int]] | None = None
    rest: float = 0.0


#: Tick of a worker's own thread that left an outbox to be delivered.
OUTBOX: Final = "outbox"

#: Tick of the ledger, where the head of a shape runs low.
REFILL: Final = "refill"

#: Tick of the ledger, where a job is blocked anew.
RESERVE: Final = "reserve"

DUTIES: Final = (
    # The transitions that the ledger alone knows come first: the other duties judge by the rows.
    Duty("stream", lambda s: s.due_interval, apply_transitions.run_once),
    # The ledger has the orders of operators before a duty starts a job.
    Duty("controls", lambda s: s.due_interval, controls.run_once),
    # Jobs that stay in Postgres are marked before others look for rows that the ledger does not know.
    Duty("refill", lambda s: s.due_interval, refill.run_once, REFILL),
    Duty("reserve", lambda s: s.due_interval, reserve.run_once, RESERVE, reserve.without_ledger, rest=0.1),
    Duty("due", lambda s: s.due_interval, due.run_once, without=fallback.expire),
    Duty("outbox", lambda s: s.due_interval, deliver_results.run_once, OUTBOX, deliver_results.run_once),
    Duty("lapse", lambda s: s.due_interval, lapse.run_once, without=fallback.lapse),
    Duty("infeasible", lambda s: s.due_interval, infeasible.run_once, without=infeasible.without_ledger),
    Duty("ageing", ageing.pause, ageing.run_once, without=ageing.without_ledger),
    Duty("sweep", sweep.pause, sweep.run_once, beat_messages.SWEEP),
    Duty("reconcile", lambda s: s.reconcile_interval, reconcile.run_once, beat_messages.RECONCILE),
    Duty("retention", archive.pause, archive.run_once, without=archive.run_once),
    Duty("replaced", sweep.pause, replaced.run_once, without=replaced.run_once),
    Duty("run_times", lambda s: s.sweep_interval, run_times.run_once, without=run_times.run_once),
    Duty("estimates", lambda s: s.sweep_interval, estimates.run_once, without=estimates.run_once),
    Duty("audit", audit.pause, audit.run_once, without=audit.run_once),
    Duty("keys", lambda s: s.sweep_interval, unique_keys.run_once, without=unique_keys.run_once),
    Duty(
        "former_workers",
        lambda s: s.reconcile_interval,
        former_workers.run_once,
        without=former_workers.without_ledger,
    ),
)

#: The reconcile out of its turn, for a caller that met a ledger without keys that it should have. It runs at most once
#: in the time between two sweeps, however many callers ask.
SUSPICION: Final = Duty("suspicion", sweep.pause, reconcile.run_once)

#: Duties for which a worker asks itself: it does them, or passes the request on, though it is not elected.
OWN: Final = frozenset({OUTBOX, SUSPICION.name})


class Runner(OnDemandLookingService):
    """Thread that runs each duty at its interval, while this worker is elected. Else the worker has no such thread.

    Each duty stands alone: a failed duty is retried after a pause of its own, and the others are done. `authority` says
    which store decides, as far as this worker knows. `ledger`: see `Candidate`. `is_idle` says
    whether the worker has nothing to do.
    """

    def __init__(
        self,
        app: Celery,
        stores: Stores,
        incarnation: str,
        authority: Callable[[], Store | None],
        ledger: Ledger,
        is_idle: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__("duties")
        self._app = app
        self._workers_stores = stores
        self._is_idle = is_idle
        # The duties have a handle of the ledger of their own: its epoch is the epoch in which they may act.
        self._stores = stores.apart()
        self.election = Candidate(stores.engine, ledger, incarnation, authority, self._on_change, self._on_asked)
        self._listener = CommitListener(stores.apart(), self.election.holds)
        self._asked: set[str] = set()
        #: True if the ledger is to be compared with Postgres out of turn.
        self._suspected = False
        #: Earliest time of the next comparison out of turn (monotonic).
        self._suspect_from = 0.0
        #: True if this worker was elected just now.
        self._won = True
        #: Time at which each duty is due (monotonic), its failures in a row, and the warning of them.
        self._next_at: dict[str, float] = {}
        self._failures: dict[str, int] = {}
        self._warnings = defaultdict[str, LastingWarning](lambda: LastingWarning(logger))

    def start(self) -> None:
        super().start()
        self._listener.start()
        self.election.start()

    # -- called by others, in any thread -------------------------------------------------------------------------

    def tick(self, name: str) -> None:
        """Note that a duty is asked for, by beat, whose ticks come to every worker, or by this worker."""
        if name in OWN or self.election.holds():
            with self._changed:
                self._asked.add(name)
            self.wake()

    def on_low(self, message: str) -> None:
        """Pass on what a script asks of the runner: a look for reservations, or else for the heads that run low."""
        self.tick(message if message == RESERVE else REFILL)

    def suspect(self) -> None:
        """Have the runner compare the ledger with Postgres soon, since the ledger lacks keys: deleted ones, say."""
        if self.election.holds():
            self.tick(SUSPICION.name)
        else:
            self.election.ask(SUSPICION.name)

    def close_spare_connections(self) -> None:
        """Keep few connections to Redis where this worker is idle, and does no duties."""
        if self._is_idle() and not self.election.holds():
            close_spare(self.election.ledger.client.connection_pool, keep=1)
            for stores in (self._workers_stores, self._stores, self._listener.stores):
                stores.close_spare_connections()
            transport.close_spare_connections()

    def stop(self, within: float) -> bool:
        self._stopping = True
        self._listener.stop(within)
        ended = super().stop(within)
        # The election stops last, when no duty runs any more: another worker may then have the lease.
        self.election.stop(within)
        return ended

    def _on_change(self) -> None:
        """Wake the threads of this worker, since it has won or lost the election; in the thread of the election."""
        self._won = True
        self.wake()
        self._listener.wake()

    def _on_asked(self, names: Sequence[str]) -> None:
        """Ask for the duties that other workers asked for; in the thread of the election."""
        for name in names:
            self.tick(name)

    def _has_work(self) -> bool:
        return bool(self._asked) or self.election.holds()

    # -- the thread ----------------------------------------------------------------------------------------------

    def run(self) -> None:
        with deadlines.patiently(self._stores.settings.store_timeout * deadlines.LONG):
            self._loop()

    def _loop(self) -> None:
        while not self._stopping:
            if not self.election.holds():
                self._serve_own()
                if self._ends():
                    return
                continue
            if self._won:
                self._won = False
                self._begin()
            self._wake.wait(max(0.0, min(self._next_at.values()) - time.monotonic()))
            due_now = self._due()
            if due_now and not self._stopping:
                self._run(due_now)

    def _begin(self) -> None:
        """Make all duties due at once, except long and rare ones, which have a tick: those an interval later."""
        now, settings = time.monotonic(), self._stores.settings
        self._next_at = {duty.name: now + (duty.interval(settings) if duty.tick else 0.0) for duty in DUTIES}

    def _due(self) -> list[Duty]:
        """Return the duties that are due or asked for now. Each is due again an interval later."""
        now, next_at, asked = time.monotonic(), self._next_at, self._take_asked()
        for duty in DUTIES:
            if duty.tick in asked:
                rested = next_at[duty.name] - duty.interval(self._stores.settings) + duty.rest if duty.rest else now
                next_at[duty.name] = min(next_at[duty.name], max(now, rested))
        due_now = [duty for duty in DUTIES if now >= next_at[duty.name]]
        for duty in due_now:
            next_at[duty.name] = now + duty.interval(self._stores.settings)
        # The last comparison may have come before the damage: a suspicion is kept until its time has come.
        self._suspected |= SUSPICION.name in asked
        if self._suspected and now >= self._suspect_from:
            self._suspected, self._suspect_from = False, now + SUSPICION.interval(self._stores.settings)
            due_now.append(SUSPICION)
        return due_now

    def _take_asked(self) -> set[str]:
        with self._changed:
            asked, self._asked = self._asked, set()
        return asked

    def _serve_own(self) -> None:
        """Deliver the outboxes that this worker left in rows, without the lease, since nobody else hears of them.

        Its successor makes the comparison that this worker was to make while it had the lease.
        """
        asked = self._take_asked()
        if self._suspected or SUSPICION.name in asked:
            self._suspected = False
            self.election.ask(SUSPICION.name)
        if OUTBOX in asked and not self._stopping:
            outbox_duty = next(duty for duty in DUTIES if duty.tick == OUTBOX)
            self._run_one(outbox_duty, outbox_duty.run)

    def _run(self, due_now: list[Duty]) -> None:
        try:
            with self._stores.engine.connect() as connection:
                current = read_authority(connection)
            if not self.election.holds(current.authority):
                # Another worker has the lease, or the authority changed and the other store's election is not over.
                self._leave(due_now)
                return
            if current.authority == Store.POSTGRES:
                self._run_without_ledger(due_now)
            else:
                self._run_with_ledger(due_now)
            self._warnings[STORES].over()
        except Exception as error:
            self.election.window.restart()
            for duty in due_now:
                self._try_soon(duty)
                self._count(duty, Pass.LEFT)
            self._say(STORES, error)

    def _run_with_ledger(self, due_now: list[Duty]) -> None:
        open_ledger(self._stores)
        # A duty that repairs the books must act in the epoch that Postgres names now.
        with self._stores.engine.connect() as connection:
            current = read_authority(connection)
        self._stores.ledger.epoch = current.epoch
        for number, duty in enumerate(due_now):
            if not self.election.holds(current.authority):
                self._leave(due_now[number:])
                return
            self._run_one(duty, duty.run)

    def _run_without_ledger(self, due_now: list[Duty]) -> None:
        for duty in due_now:
            if duty.without is None:
                self._count(duty, Pass.SKIPPED)
            elif self.election.holds(Store.POSTGRES):
                self._run_one(duty, duty.without)
            else:
                self._count(duty, Pass.LEFT)

    def _leave(self, duties: Sequence[Duty]) -> None:
        """Leave these duties to the worker that has the lease now. A suspicion is kept until that one hears of it."""
        self._suspected |= SUSPICION in duties
        for duty in duties:
            self._count(duty, Pass.LEFT)

    def _count(self, duty: Duty, result: Pass) -> None:
        self.election.ledger.tally.add(f"duty.{duty.name}.{result}")

    def _run_one(self, duty: Duty, run: Callable[..., Mapping[str, int]]) -> None:
        """Run a duty. A failure concerns no other duty: this one is retried after a pause of its own."""
        more = {"window": self.election.window} if duty.name == "lapse" else {}
        try:
            totals = run(self._app, self._stores, **more)
        except Exception as error:
            self._count(duty, Pass.FAILED)
            self._failures[duty.name] = self._failures.get(duty.name, 0) + 1
            self._try_soon(duty)
            self._say(f"duty {duty.name}", error)
            # LOST counts only time in which heartbeats could be read.
            if _lies_in(RedisError if run is duty.run else SQLAlchemyError, error):
                self.election.window.restart()
            return
        self._count(duty, Pass.DONE)
        self._failures.pop(duty.name, None)
        self._warnings[f"duty {duty.name}"].over()
        counts = {name: number for name, number in totals.items() if number}
        if counts:
            logger.info("duty %s: %s", duty.name, ", ".join(f"{name} {number}" for name, number in counts.items()))

    def _try_soon(self, duty: Duty) -> None:
        """Have a failed duty retried soon: not at its next interval, which may be long, and not at once."""
        settings = self._stores.settings
        pause = settings.due_interval * 2 ** min(self._failures.get(duty.name, 0), MAX_DOUBLINGS)
        again_at = time.monotonic() + min(pause, duty.interval(settings))
        if duty is SUSPICION:
            self._suspected, self._suspect_from = True, again_at
        else:
            self._next_at[duty.name] = again_at

    def _say(self, what: str, error: Exception) -> None:
        """Log a failure once, not at every try."""
        why = one_line(error) if isinstance(error, DBAPIError) else str(error)
        passes = isinstance(error, (PlatformError, LedgerClosed, RedisError, SQLAlchemyError))
        message = f"{what} is tried again: {type(error).__name__}: {why}"
        self._warnings[what].warn(message, trace=None if passes else error)


def _lies_in(store: type[Exception], error: BaseException | None) -> bool:
    """Return True if an error comes from a store that could not be read. A store with a locked row does answer."""
    if is_locked(error):
        return False
    while error is not None:
        if isinstance(error, (store, LedgerClosed)):
            return True
        error = error.__cause__
    return False
