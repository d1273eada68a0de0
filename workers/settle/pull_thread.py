"""The thread of a worker that takes jobs from Postgres, and settles them there, while the ledger is gone.

The thread never touches the ledger. It lives only while Postgres decides.
"""

from __future__ import annotations

import logging
import select
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import psycopg2
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from celery_capacity.routing import os_threads
from celery_capacity.routing.config import timeouts
from celery_capacity.routing.database.postgres_errors import one_line
from celery_capacity.routing.database.schema import CHANNEL
from celery_capacity.routing.fallback import reservation_rows
from celery_capacity.routing.fallback.reservation_rows import can_hold
from celery_capacity.routing.lasting_warning import LastingWarning
from celery_capacity.routing.model.request import Request, filed_shape, split_suffix
from celery_capacity.routing.model.states import Outcome, Store
from celery_capacity.routing.policy.placement import held_by
from celery_capacity.routing.store import claims, controls, fencing
from celery_capacity.routing.store.claims import Candidate, Passing
from celery_capacity.routing.store.refused_transitions import concerns_data
from celery_capacity.workers.membership.context import WorkerContext
from celery_capacity.workers.process.holdings import Holding
from celery_capacity.workers.process.service import OnDemandLookingService
from celery_capacity.workers.process.stores import Stores, transactions

logger = logging.getLogger(__name__)

#: Tries in a row in which other workers may be faster, before this worker waits for the next interval. A row that
#: somebody keeps locked looks free to all.
MAX_MISSES: Final = 5


class Puller(OnDemandLookingService):
    """Thread that takes jobs from Postgres.

    `start_job` gets the text of each message, in this thread. `can_start` says whether it would start at once. `flush`
    waits until Postgres has all earlier notes of this worker. A change of authority wakes this service.
    """

    def __init__(
        self,
        context: WorkerContext,
        stores: Stores,
        flush: Callable[[float], bool],
        start_job: Callable[[str], None],
        can_start: Callable[[], bool],
    ) -> None:
        super().__init__("pull")
        self._stores, self._engine = stores, context.engine
        self._transactions = transactions(self._engine)
        self._settings = context.settings
        self._identity = context.identity
        self._confirmation = context.confirmation
        self._holdings = context.holdings
        self._flush = flush
        self._flush_within = timeouts.FLUSH * context.settings.store_timeout
        self._start_job = start_job
        self._can_start = can_start
        #: Called where this worker is cordoned.
        self.on_cordon: Callable[[], None] = lambda: None
        #: Earliest time of the next look for a cordon while nothing fits (monotonic).
        self._cordon_from = 0.0
        #: Set in a signal handler: this worker takes nothing any more.
        self.draining = False
        self._listening: Any = None
        #: Time of the next try to listen (monotonic).
        self._listen_at = 0.0
        #: Time until which Postgres's list of this worker's jobs need not be compared again (monotonic).
        self._compared_until = 0.0
        #: Jobs for which an error is logged already, since their rows take no write.
        self._unwritable: set[str] = set()
        self._warning = LastingWarning(logger)

    def _has_work(self) -> bool:
        return self._confirmation.authority == Store.POSTGRES

    def run(self) -> None:
        while not self._stopping:
            if not self._has_work():
                self._listen_no_more()
                if self._ends():
                    return
            try:
                self._wait()
                if self._confirmation.may_pull:
                    self._pass()
                self._warning.over()
            except (SQLAlchemyError, psycopg2.Error) as error:
                self._compared_until = 0.0
                self._warning.warn(f"pull: Postgres does not answer: {type(error).__name__}")
                self._begin_again()
            except Exception:
                # No error may end this thread: without it this worker starts nothing while the ledger is gone.
                logger.exception("a pull failed; the next one is tried")
                self._begin_again()
        self._listen_no_more()

    def _pass(self) -> None:
        """Compare the holdings with Postgres if that is due, then take jobs until nothing more fits."""
        now = time.monotonic()
        if now >= self._compared_until and self._compare():
            self._compared_until = now + self._settings.renew_interval
        misses, passed = 0, set[str]()
        while self._confirmation.may_pull and not (self.draining or self._stopping) and misses < MAX_MISSES:
            count = self._take(passed)
            if count is None:
                return
            misses = 0 if count else misses + 1

    def _take(self, passed: set[str]) -> int | None:
        """Take jobs that fit beside those held here, and start them; return how many, None where nothing fits.

        `passed`: jobs that could not be taken in this pass, since another worker has them, or their rows are locked.
        """
        most_losses = self._settings.most_losses
        book = self._holdings.book()
        if not self._can_start() or not book.open:
            self._look_for_cordon()
            return None
        with self._engine.connect() as connection:
            held = reservation_rows.holding_back(connection, self._identity.name, self._confirmation.epoch, most_losses)
            if held.cordoned:
                self.on_cordon()
                return None
            if held.row is not None and held.row.head is not None and not can_hold(book, held.row.head):
                reservation_rows.refuse(connection, held.row, book)
                held = held._replace(row=None)
            chosen = claims.look(connection, book, most_losses, passed, held.reservation, held.now)
            if not chosen:
                return None
            # A lost answer leaves rows that this worker does not know of: then the next pass compares again.
            self._compared_until, compared_until = 0.0, self._compared_until
            ids = [row.job for row in chosen]
            taken = self._take_these(connection, chosen, held.passing(chosen, most_losses))
            self._compared_until = compared_until
            if not taken and held.row is not None and not reservation_rows.is_current(connection, held.row):
                return 0
        passed.update(set(ids).difference(row.job for row in taken))
        for row in taken:
            request = held_by(Request.from_shape(row.shape), row.losses, most_losses)
            times = (row.started_ms, row.started_ms)
            filed = filed_shape(request.shape + split_suffix(row.shape)[1], row.name)
            facts = (request, "", *times, row.losses, row.rerun)
            holding = Holding(row.job, row.token, *facts, filed=filed, submitted_ms=row.submitted_ms)
            self._holdings.add(holding)
            self._start_job(row.message)
        return len(taken)

    def _look_for_cordon(self) -> None:
        """Look for a cordon of a full worker, once in an interval: a drain may have a deadline for what runs here."""
        now = time.monotonic()
        if now >= self._cordon_from:
            self._cordon_from = now + self._settings.due_interval
            with self._engine.connect() as connection:
                cordoned = controls.is_cordoned(connection, self._identity.name)
            if cordoned:
                self.on_cordon()

    def _take_these(
        self, connection: Connection, rows: Sequence[Candidate], passing: Passing | None
    ) -> list[claims.Taken]:
        """Take those of these jobs that still wait, and whose rows Postgres lets anybody write."""
        me, most_losses = self._identity, self._settings.most_losses
        ids, held = [row.job for row in rows], {row.job: row.held for row in rows if row.held}
        epoch = self._confirmation.epoch
        try:
            return claims.take(connection, epoch, me.name, me.incarnation, ids, most_losses, passing, held)
        except DBAPIError as error:
            if not concerns_data(error):
                raise
            if len(ids) == 1:
                if ids[0] not in self._unwritable:
                    self._unwritable.add(ids[0])
                    logger.error(
                        "job %s waits, since Postgres refuses each write to its row: %s", ids[0], one_line(error)
                    )
                return []
        half = len(ids) // 2
        return self._take_these(connection, rows[:half], passing) + self._take_these(connection, rows[half:], passing)

    def _compare(self) -> bool:
        """Give back jobs that this worker has by its rows and does not hold; return False where it cannot compare.

        The old books admitted such a job and nobody claimed it, or a statement took it and its answer was lost. Nothing
        can be compared while Postgres lacks notes of this worker.
        """
        if not self._flush(self._flush_within):
            return False
        most_losses = self._settings.most_losses
        # Read the holdings first: a job of this list that is no longer held has ended by then, and its row says so.
        held = {holding.key for holding in self._holdings.all()}
        with self._transactions.begin() as connection:
            rows = claims.open_attempts(connection, self._identity.incarnation)
            strays = [row for row in rows if (row.job, row.token) not in held]
            for job, token in fencing.committed(connection, self._identity.incarnation):
                if (job, token) not in held:
                    fencing.close(connection, job, token)
            # A job whose row is locked is left for the next comparison, so that it stops nothing here.
            if claims.give_back_free(
                connection, strays, Outcome.TAKEN_BACK, "its worker does not hold it", most_losses
            ):
                claims.wake(connection)
        if strays:
            logger.warning("%d jobs that this worker does not hold were given back", len(strays))
        return True

    # -- waiting -------------------------------------------------------------------------------------------------

    def _wait(self) -> None:
        """Wait until somebody wakes this thread, Postgres notifies of a job to take, or an interval is over."""
        if self._listening is None and time.monotonic() >= self._listen_at:
            self._listen()
        poll = os_threads.poll()
        poll.register(self._wake.fileno(), select.POLLIN)
        if self._listening is not None:
            poll.register(self._listening.fileno(), select.POLLIN)
        ready = poll.poll(self._settings.due_interval * 1000)
        self._wake.clear()
        if any(descriptor != self._wake.fileno() for descriptor, _ in ready):
            self._hear()

    def _listen(self) -> None:
        """Listen to Postgres on a connection of this thread's own, past a pooler.

        A notification comes only to the session that listens. Where no connection is left, this thread looks at each
        interval.
        """
        try:
            pooled = self._stores.direct.raw_connection()
            self._listening = pooled.driver_connection
            pooled.detach()
            with self._listening.cursor() as cursor:
                cursor.execute(f"LISTEN {CHANNEL}")
        except (SQLAlchemyError, psycopg2.Error) as error:
            self._listen_no_more()
            self._listen_at = time.monotonic() + self._settings.renew_interval
            logger.warning(
                "pull: Postgres sends no notifications, it is asked every %g s: %s", self._settings.due_interval, error
            )

    def _hear(self) -> None:
        try:
            self._listening.poll()
            self._listening.notifies.clear()
        except psycopg2.Error:
            # The next wait listens anew. A job notified meanwhile is found at the next interval.
            self._listen_no_more()

    def _listen_no_more(self) -> None:
        if self._listening is not None:
            self._listening.close()
            self._listening = None

    def _begin_again(self) -> None:
        """Have the next pass begin on new connections, after an interval."""
        self._listen_no_more()
        self._wake.wait(self._settings.due_interval)
