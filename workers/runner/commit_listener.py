"""Listener of the runner for jobs that a caller's own transaction has committed (`routing.insert.caller_session`).

A connection that listens can do nothing else, and needs a session of its own: behind a pooler it would hear nothing. So
only the worker that runs the duties listens, on a direct connection. While nobody listens, the sweep finds committed
jobs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any, Final

import psycopg2
from redis.exceptions import RedisError
from sqlalchemy.exc import SQLAlchemyError

from celery_capacity.routing.database.authority import read_authority
from celery_capacity.routing.database.schema import CHANNEL
from celery_capacity.routing.errors import PlatformError
from celery_capacity.routing.lasting_warning import LastingWarning
from celery_capacity.routing.ledger.replies import LedgerClosed
from celery_capacity.routing.model.states import Store
from celery_capacity.routing.recovery import resubmit, transition_log
from celery_capacity.routing.store import backlog
from celery_capacity.workers.process.service import OnDemandLookingService
from celery_capacity.workers.process.stores import Stores

logger = logging.getLogger(__name__)

#: Name of the connection in `pg_stat_activity`.
NAME: Final = "celery-capacity-listen"
#: Most rows brought in by one statement.
MAX_ROWS: Final = 1000
#: Settings by which the connection of a runner whose machine lost its power is soon gone.
_SHORT_LIVED: Final = (
    f"SET application_name = '{NAME}'; SET tcp_keepalives_idle = 5; SET tcp_keepalives_interval = 2; "
    "SET tcp_keepalives_count = 3; SET tcp_user_timeout = {}"
)


class CommitListener(OnDemandLookingService):
    """Thread that listens while this worker is elected, and brings in the jobs that it hears of.

    `stores` has a handle of the ledger for this thread alone. `elected` says whether this worker is to listen: a change
    of that wakes this service.
    """

    def __init__(self, stores: Stores, elected: Callable[[], bool]) -> None:
        super().__init__("listen")
        self.stores = stores
        self._elected = elected
        self._listening: Any = None
        self._warning = LastingWarning(logger)

    def _has_work(self) -> bool:
        return self._elected()

    def run(self) -> None:
        interval = self.stores.settings.due_interval
        while not self._stopping:
            try:
                if not self._elected():
                    self._end()
                    if self._ends():
                        return
                    continue
                if self._listening is None:
                    self._begin()
                self._hear(interval)
                self._warning.over()
                continue
            except (SQLAlchemyError, psycopg2.Error, PlatformError, LedgerClosed, RedisError) as error:
                self._warning.warn(f"no listener: committed jobs wait for the sweep: {type(error).__name__}: {error}")
            except Exception:
                logger.exception("listening failed; it is tried again")
            self._end()
            self._wake.wait(interval)
        self._end()

    def _begin(self) -> None:
        pooled = self.stores.direct.raw_connection()
        self._listening = pooled.driver_connection
        pooled.detach()
        with self._listening.cursor() as cursor:
            cursor.execute(_SHORT_LIVED.format(round(self.stores.settings.store_timeout * 1000)))
            cursor.execute(f"LISTEN {CHANNEL}")
        # No notification comes again for jobs that were committed before.
        self._bring_in([""])

    def _hear(self, seconds: float) -> None:
        """Wait `seconds` seconds for notifications, and bring in the jobs that they name."""
        _, readable = self._wake.wait_beside(self._listening.fileno(), seconds)
        if not readable:
            return
        self._listening.poll()
        payloads = [notification.payload for notification in self._listening.notifies]
        self._listening.notifies.clear()
        if payloads:
            self._bring_in(payloads)

    def _bring_in(self, payloads: Iterable[str]) -> None:
        """Bring in jobs by their ids; '' stands for all accepted jobs."""
        ids = list(dict.fromkeys(payloads))
        if "" not in ids:
            for start in range(0, len(ids), MAX_ROWS):
                with self.stores.engine.connect() as connection:
                    rows = backlog.accepted(connection, ids[start : start + MAX_ROWS])
                if rows and not self._submit(rows):
                    return
            return
        if not self._may_bring_in_all():
            return
        after = 0
        while True:
            with self.stores.engine.connect() as connection:
                rows = backlog.stranded(connection, 0.0, MAX_ROWS, after)
            if not rows or not self._submit(rows):
                return
            after = rows[-1].seq

    def _may_bring_in_all(self) -> bool:
        """Return True if there are accepted jobs that are known not to have started (see `sweep`)."""
        engine, ledger = self.stores.engine, self.stores.ledger
        with engine.connect() as connection:
            current = read_authority(connection)
            if current.authority != Store.LEDGER or not backlog.stranded(connection, 0.0, 1):
                return False
        ledger.epoch = current.epoch
        if ledger.is_cold() or ledger.is_unfinished():
            # The opener brings them in. It knows which of them may have started (`routing.policy.unknown_starts`).
            return False
        resubmit.go_on(engine, ledger, transition_log.apply_all(engine, ledger)[1])
        return True

    def _submit(self, rows: list[backlog.Pending]) -> bool:
        """Submit rows to the ledger; return False if it does not decide, is not open or does not answer.

        The sweep submits them then.
        """
        with self.stores.engine.connect() as connection:
            current = read_authority(connection)
        if current.authority != Store.LEDGER:
            # Workers that take jobs from Postgres listen themselves.
            return False
        self.stores.ledger.epoch = current.epoch
        try:
            resubmit.submit_rows(self.stores.ledger, rows)
        except (PlatformError, LedgerClosed) as error:
            logger.info("%d jobs were committed, and wait for the sweep: %s", len(rows), error)
            return False
        return True

    def _end(self) -> None:
        if self._listening is not None:
            self._listening.close()
            self._listening = None
