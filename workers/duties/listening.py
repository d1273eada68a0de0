"""The one worker that listens to Postgres for jobs which somebody's own transaction has committed (`routing.within`).

A connection that listens can do nothing else, and each worker has only one to spare. So one worker of all listens: who
holds an advisory lock on that connection, which ends with it. One worker at a time, in its turn, looks whether the lock
is free. While nobody listens, the sweep finds what was committed.
"""

from __future__ import annotations

import logging
import select
from collections.abc import Iterable
from typing import Any, Final

import psycopg2
from redis.exceptions import RedisError
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from routing import backlog, enroll, native, pull, roster
from routing.errors import PlatformError
from routing.replies import LedgerClosed
from workers.stores import TCP_WITHIN_MS, Stores
from workers.wake import Wake

logger = logging.getLogger(__name__)

#: The advisory lock of who listens.
LISTEN_LOCK: Final = 0x_CE1E_0200
#: The turn to look whether it is free, and the part of an interval for which it is taken.
TURN: Final = "listen"
TURN_PART: Final = 0.9
#: Rows brought in by one statement.
MOST: Final = 1000
#: A worker whose machine lost its power has no more to say, and its lock is soon free.
_SHORT_LIVED: Final = (
    f"SET tcp_keepalives_idle = 5; SET tcp_keepalives_interval = 2; SET tcp_keepalives_count = 3; "
    f"SET tcp_user_timeout = {TCP_WITHIN_MS}"
)


class Listener(native.Thread):
    """`stores`: with a handle of the ledger of its own."""

    def __init__(self, stores: Stores, incarnation: str) -> None:
        super().__init__(name="listen", daemon=True)
        self._stores = stores
        self._incarnation = incarnation
        self._wake = Wake()
        self._stopping = False
        self._listening: Any = None
        self._said = ""

    def stop(self, within: float) -> None:
        self._stopping = True
        self._wake.set()
        if self.is_alive():
            self.join(within)

    def run(self) -> None:
        interval = self._stores.settings.due_interval
        while not self._stopping:
            try:
                if self._listening is not None or self._begin():
                    self._hear(interval)
                else:
                    self._wake.wait(interval)
                self._said = ""
            except (SQLAlchemyError, psycopg2.Error, PlatformError, LedgerClosed, RedisError) as error:
                self._end()
                self._say(f"nobody listens here for what is committed: {type(error).__name__}: {error}")
                self._wake.wait(interval)
            except Exception:
                self._end()
                logger.exception("listening failed; it is tried again")
                self._wake.wait(interval)
        self._end()

    def _begin(self) -> bool:
        """Listen, if it is this worker's turn and nobody else does."""
        milliseconds = max(1, round(self._stores.settings.due_interval * TURN_PART * 1000))
        if not self._stores.ledger.take_turn(TURN, self._incarnation, milliseconds) or self._is_taken():
            return False
        pooled = self._stores.engine.raw_connection()
        own: Any = pooled.driver_connection
        pooled.detach()
        self._listening = own
        with own.cursor() as cursor:
            cursor.execute(_SHORT_LIVED)
            cursor.execute("SELECT pg_try_advisory_lock(%s)", (LISTEN_LOCK,))
            if not cursor.fetchone()[0]:
                self._end()
                return False
            cursor.execute(f"LISTEN {pull.CHANNEL}")
        # What was committed before nobody will say again.
        self._bring_in([""])
        return True

    def _is_taken(self) -> bool:
        """Looked up on a connection that is there, so that no other is opened in vain."""
        lock = {"key": LISTEN_LOCK}
        with self._stores.engine.connect() as connection:
            if not connection.execute(text("SELECT pg_try_advisory_lock(:key)"), lock).scalar_one():
                return True
            connection.execute(text("SELECT pg_advisory_unlock(:key)"), lock)
        return False

    def _hear(self, within: float) -> None:
        """Wait for notifications, and bring in what they name."""
        poll = native.poll()
        poll.register(self._wake.fileno(), select.POLLIN)
        poll.register(self._listening.fileno(), select.POLLIN)
        ready = poll.poll(within * 1000)
        self._wake.clear()
        if not any(descriptor != self._wake.fileno() for descriptor, _ in ready):
            return
        self._listening.poll()
        said = [one.payload for one in self._listening.notifies]
        self._listening.notifies.clear()
        if said:
            self._bring_in(said)

    def _bring_in(self, said: Iterable[str]) -> None:
        """`said`: ids of jobs; '' stands for all that are accepted."""
        named = list(dict.fromkeys(said))
        if "" not in named:
            for start in range(0, len(named), MOST):
                with self._stores.engine.connect() as connection:
                    rows = backlog.accepted(connection, named[start : start + MOST])
                if rows and not self._submit(rows):
                    return
            return
        after = 0
        while True:
            with self._stores.engine.connect() as connection:
                rows = backlog.stranded(connection, 0.0, MOST, after)
            if not rows or not self._submit(rows):
                return
            after = rows[-1].seq

    def _submit(self, rows: list[backlog.Pending]) -> bool:
        """False where the ledger takes none now: it does not decide, is not open or does not answer; the sweep will."""
        with self._stores.engine.connect() as connection:
            known = roster.read_authority(connection)
        if known.authority != "ledger":
            # Those who take jobs from Postgres listen themselves.
            return False
        self._stores.ledger.epoch = known.epoch
        try:
            enroll.submit_rows(self._stores.ledger, rows)
        except (PlatformError, LedgerClosed) as error:
            logger.info("%d jobs were committed, and wait for the sweep: %s", len(rows), error)
            return False
        return True

    def _end(self) -> None:
        if self._listening is not None:
            self._listening.close()
            self._listening = None

    def _say(self, what: str) -> None:
        """Say a thing once, not at every interval."""
        if what != self._said:
            self._said = what
            logger.warning(what)
