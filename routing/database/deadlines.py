"""Deadlines of calls to Postgres: a call ends in time, also where the server is stopped.

libpq waits for an answer without a limit. The kernel of a stopped server goes on to acknowledge all packets, so no
time-out of TCP helps either. So one thread of each process, the watchdog, knows all calls that are under way. It shuts
down the socket of a call that is past its deadline, and the call ends as after a lost connection: `Stalled`.

A call costs an entry of a dict. The watchdog sleeps until the earliest deadline. So it wakes at most once in the time
of one limit while calls come and go. It ends when there was no call for a while, and the next call starts it again.
"""

from __future__ import annotations

import _socket
import math
import os
import socket
import threading
import time
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from types import TracebackType
from typing import Any, Final

import psycopg2
from psycopg2 import extensions
from sqlalchemy import Connection as SQLConnection
from sqlalchemy.exc import DBAPIError

from celery_capacity.routing import os_threads

#: Multiple of the limit that a statement of a duty, of a rebuild or of a check may last: they read whole tables.
LONG: Final = 6
#: Seconds until the watchdog looks again at a connection that has no socket yet.
_LOOK_AGAIN: Final = 0.1
#: Seconds without a call after which the watchdog ends.
_IDLE: Final = 5.0


class Stalled(psycopg2.OperationalError):
    """Postgres did not answer before the deadline, and the connection has been ended.

    `sent`: the statement was on its way, so that the server may still carry it out.
    """

    sent: bool = True


def unsent(error: DBAPIError) -> bool:
    """Return True if an error is a `Stalled` of which the server has no statement to carry out."""
    return isinstance(error.orig, Stalled) and not error.orig.sent


def nothing_written(error: BaseException) -> None:
    """Mark an error as one after which the server cannot have carried anything out.

    Its statements were in a transaction that was not committed, or they write nothing.
    """
    driver = error.orig if isinstance(error, DBAPIError) else error
    if isinstance(driver, Stalled):
        driver.sent = False


class _ThreadDeadlines(threading.local):
    """Deadlines of a thread. `limit`: seconds of each call; `until`: end of all calls of a block (monotonic)."""

    limit: float | None = None
    until: float = math.inf


_of_thread: Final = _ThreadDeadlines()


class within:  # noqa: N801 - reads as a statement
    """Let all calls of this thread within the block end in so many seconds, counted from its start.

    Inside another block the earlier deadline counts, unless this block begins `anew`: for a try of a caller that waits
    for Postgres.
    """

    __slots__ = ("_anew", "_outer", "_seconds")

    def __init__(self, seconds: float, *, anew: bool = False) -> None:
        self._seconds = seconds
        self._anew = anew

    def __enter__(self) -> None:
        self._outer = _of_thread.until
        until = time.monotonic() + self._seconds
        _of_thread.until = until if self._anew else min(self._outer, until)

    def __exit__(self, *_: object) -> None:
        _of_thread.until = self._outer


class patiently:  # noqa: N801 - reads as a statement
    """Give each call of this thread within the block so many seconds, instead of the limit of its connection."""

    __slots__ = ("_outer", "_seconds")

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __enter__(self) -> None:
        self._outer = _of_thread.limit
        _of_thread.limit = self._seconds

    def __exit__(self, *_: object) -> None:
        _of_thread.limit = self._outer


def left() -> float:
    """Return the seconds that are left of the block `within`; infinite outside of one."""
    return _of_thread.until - time.monotonic()


class _Watchdog:
    """The registry of all calls under way, one for each process, which cuts calls past their deadlines."""

    def __init__(self) -> None:
        self.calls: dict[Call, None] = {}
        #: When the thread looks next (monotonic). A call with an earlier deadline rings.
        self.looks_at = math.inf
        self._bell: Any = os_threads.allocate_lock()
        self._bell.acquire()
        #: Held while a socket is shut down, so that its number is not another file's meanwhile.
        self.cutting: Any = os_threads.allocate_lock()
        self._starting: Any = os_threads.allocate_lock()
        self._runs = False

    def ring(self) -> None:
        """Make the thread look at once; start the thread at the first call."""
        if not self._runs:
            self._start()
        # The bell has been rung already.
        with suppress(RuntimeError):
            self._bell.release()

    def _start(self) -> None:
        with self._starting:
            if self._runs:
                return
            # A system without a thread for us leaves this call without a deadline; the next one tries again.
            with suppress(RuntimeError):
                os_threads.start_thread(self._run)
                self._runs = True

    def _run(self) -> None:
        while True:
            # This comes first: a call that begins after the look below rings.
            self.looks_at = math.inf
            now, earliest = time.monotonic(), math.inf
            for call in self.calls.copy():
                if call.deadline <= now:
                    self._cut(call, now)
                if not call.cut:
                    earliest = min(earliest, call.deadline)
            self.looks_at = earliest
            wait = _IDLE if earliest == math.inf else min(max(0.0, earliest - now), threading.TIMEOUT_MAX)
            if not self._bell.acquire(True, wait) and earliest == math.inf and self._ends():
                return

    def _ends(self) -> bool:
        """Return True if the thread is to end, since no call is under way."""
        with self._starting:
            # In this order: a call that comes after the look below starts a thread.
            self._runs = False
            self._runs = bool(self.calls)
            return not self._runs

    def _cut(self, call: Call, now: float) -> None:
        with self.cutting:
            # In one step: a call may end by itself at any moment. A call that ends from here on waits for `cutting`.
            if self.calls.pop(call, call) is call:
                return
            try:
                descriptor = call.connection.fileno()
            except Exception:
                # Any driver may raise here: a connection that has no socket now is looked at again.
                descriptor = -1
            if descriptor < 0:
                # The connection is being made: libpq has a limit for that, and the driver asks something afterwards.
                call.deadline = now + _LOOK_AGAIN
                self.calls[call] = None
                return
            call.cut = True
            _shut_down(descriptor)


def _shut_down(descriptor: int) -> None:
    # The connection may be gone already: no error ends the watchdog.
    with suppress(OSError):
        # Not gevent's socket, which its loop would watch. The descriptor still belongs to libpq, which closes it.
        cut = _socket.socket(fileno=descriptor)
        try:
            cut.shutdown(socket.SHUT_RDWR)
        finally:
            cut.detach()


_watchdog = _Watchdog()


def _after_fork() -> None:
    """Start a child process with a new watchdog: no thread runs there, and no call is under way."""
    global _watchdog
    _watchdog = _Watchdog()


os.register_at_fork(after_in_child=_after_fork)


class Call:
    """A context manager for a call to Postgres, which cuts the connection where the block lasts too long.

    The block may last `limit` seconds, and no longer than the time that is left of `within`. Raises `Stalled`.
    """

    __slots__ = ("_seconds", "connection", "cut", "deadline")

    def __init__(self, connection: Any, limit: float) -> None:
        self.connection = connection
        now = time.monotonic()
        self.deadline = min(now + (_of_thread.limit or limit), _of_thread.until)
        self._seconds = self.deadline - now
        self.cut = False

    def __enter__(self) -> None:
        if self._seconds <= 0:
            # The connection may be in the middle of a transaction, which nobody would end.
            self._end_connection()
            raise _stalled("no time was left for it", sent=False)
        watchdog = _watchdog
        watchdog.calls[self] = None
        if self.deadline < watchdog.looks_at:
            watchdog.ring()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        watchdog = _watchdog
        if watchdog.calls.pop(self, self) is self:
            # The watchdog took the call: its socket is not closed before the watchdog has let go of it.
            with watchdog.cutting:
                # The watchdog put the call back if it had no socket just then.
                watchdog.calls.pop(self, None)
        if self.cut and isinstance(error, psycopg2.Error):
            self._end_connection()
            raise _stalled(f"no answer within {self._seconds:.3g} s") from error

    def _end_connection(self) -> None:
        if getattr(self.connection, "made", True):
            with suppress(psycopg2.Error):
                self.connection.close()


def _stalled(why: str, *, sent: bool = True) -> Stalled:
    error = Stalled(f"the connection was given up, {why}")
    error.sent = sent
    return error


class Cursor(extensions.cursor):
    """The driver's cursor, whose statements have the limit of their connection."""

    connection: Connection

    def execute(self, query: Any, vars: Any = None) -> None:  # noqa: A002 - the driver's name
        with Call(self.connection, self.connection.limit):
            super().execute(query, vars)

    def executemany(self, query: Any, vars_list: Any) -> None:
        with Call(self.connection, self.connection.limit):
            super().executemany(query, vars_list)

    def copy_expert(self, sql: Any, file: Any, size: int = 8192) -> None:
        with Call(self.connection, self.connection.limit):
            super().copy_expert(sql, file, size)


class Connection(extensions.connection):
    """The driver's connection. Each call ends within `limit` seconds. `made`: the server has accepted it."""

    made = False

    def __init__(self, dsn: str, async_: int = 0, *, limit: float) -> None:
        self.limit = limit
        try:
            with Call(self, limit):
                super().__init__(dsn, async_)  # type: ignore[call-arg]
        except Stalled as error:
            # No statement has been sent on this connection yet.
            error.sent = False
            raise
        self.cursor_factory = Cursor
        self.made = True

    def commit(self) -> None:
        with Call(self, self.limit):
            super().commit()

    def rollback(self) -> None:
        with Call(self, self.limit):
            super().rollback()


def watched(connection: SQLConnection, limit: float) -> AbstractContextManager[object]:
    """Limit a connection of another engine to `limit` seconds within the block, where its driver names its socket."""
    driver = connection.connection.driver_connection
    if isinstance(driver, Connection) or not callable(getattr(driver, "fileno", None)):
        return nullcontext()
    return Call(driver, limit)


def connection_factory(limit: float) -> Any:
    """Return a factory of connections for `connect_args`. Each call on them ends within `limit` seconds."""
    return partial(Connection, limit=limit)
