"""Pool of connections to Postgres that keeps some while they are in use, and one at rest.

A new connection costs Postgres a process, and each statement that is prepared is planned anew there: together ten times
the cost of a usual statement. A connection at rest costs a place among `max_connections`. A busy worker asks from
several threads at once, so it keeps the connections that it used lately.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import QueuePool

if TYPE_CHECKING:
    from sqlalchemy.pool import ConnectionPoolEntry

#: Most connections that a pool can keep, and that it can have at once.
MAX_KEPT: Final = 3
MAX_CONNECTIONS: Final = 10
#: Seconds for which a connection beside the first is kept without use.
REST_AFTER: Final = 5.0


class RestingPool(QueuePool):
    """Pool that keeps one connection, or `kept` of them while they are used. The connection used last goes first.

    A connection that was not used for `REST_AFTER` seconds is closed when another one comes back.
    """

    kept = 1

    def __init__(self, creator: Any, **options: Any) -> None:
        options |= {"pool_size": MAX_KEPT, "max_overflow": MAX_CONNECTIONS - MAX_KEPT, "use_lifo": True}
        super().__init__(creator, **options)
        self.clock: Callable[[], float] = time.monotonic

    def recreate(self) -> RestingPool:
        pool = super().recreate()
        assert isinstance(pool, RestingPool)
        pool.kept, pool.clock = self.kept, self.clock
        return pool

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        if not self._keep(record):
            self._let_go(record)
            return
        for rested in self._rested():
            self._let_go(rested)

    def _keep(self, record: ConnectionPoolEntry) -> bool:
        """Put a connection back. Return False where enough of them are there, also of threads that come at once."""
        pool: Any = self._pool
        info: Any = record.record_info
        with pool.mutex:
            if len(pool.queue) >= self.kept:
                return False
            info["returned"] = self.clock()
            super()._do_return_conn(record)
            return True

    def _rested(self) -> list[Any]:
        """Take out the connections that nobody used for a while, but for the one that was used last."""
        pool: Any = self._pool
        until, rested = self.clock() - REST_AFTER, []
        with pool.mutex:
            while len(pool.queue) > 1 and pool.queue[0].record_info["returned"] <= until:
                rested.append(pool.queue.popleft())
        return rested

    def _let_go(self, record: ConnectionPoolEntry) -> None:
        try:
            record.close()
        finally:
            self._dec_overflow()
