"""Settling in the worker's main loop: as a rule no job is passed to the ledger thread and back.

The main loop hears of an end, sends the release at once, and goes on. When the reply is there it starts the next jobs.
Jobs that end or arrive meanwhile go together in the next call. So the loop never waits for the ledger: it reads only
what came (`routing.line`).

Everything that may wait stays with the ledger thread: connections, errors, lost answers, a call whose reply is late, a
ledger of another epoch, and every end while Postgres decides. Loop or thread, it has its turn while it holds
`exclusive`.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from celery_capacity.routing.errors import PlatformError
from celery_capacity.routing.ledger.replies import LedgerClosed, Settled, Settling
from celery_capacity.routing.line import Line

logger = logging.getLogger(__name__)

#: Seconds after which the ledger thread waits for a reply in place of the main loop.
LATE: Final = 0.5
#: Seconds between tries to connect while the server takes no more connections.
CONNECT_EVERY: Final = 5.0
#: Most bytes of ends that the main loop sends at once. Its socket has room for more (`routing.line`).
MAX_BYTES: Final = 65_536


@dataclass(frozen=True, slots=True)
class Flight:
    """Call under way. `line`: its connection. `batch`: what it settles. `at`: when it was sent (monotonic)."""

    line: Line
    settling: Settling
    batch: Any
    at: float


class SettleLoop:
    """Calls of the main loop to the ledger, one at a time.

    `is_pending` tells if a job ended or arrived. `begin` returns a batch and its calls, None where the ledger thread is
    to settle. `finish` takes a batch, its reply, and the start of the jobs that it brings; None for a start by another
    thread. `wake_thread` has the ledger thread look. The thread that takes a flight out of `_flights` has its turn.
    """

    def __init__(
        self,
        ledger: Any,
        exclusive: threading.Lock,
        is_pending: Callable[[], bool],
        begin: Callable[[], tuple[Any, Settling] | None],
        finish: Callable[[Any, Settled, Callable[[], None] | None], None],
        wake_thread: Callable[[], None],
    ) -> None:
        self._ledger = ledger
        self._exclusive = exclusive
        self._is_pending = is_pending
        self._begin = begin
        self._finish = finish
        self._wake_thread = wake_thread
        self._flights: deque[Flight] = deque()
        self._line: Line | None = None
        #: Connections to be closed, in the main loop, which may watch them.
        self._former: deque[Line] = deque()
        self._hub: Any = None
        self._watched: Line | None = None
        #: Connection on which the ledger thread waits for a late reply.
        self._awaited: Line | None = None
        self._main = 0
        #: Time (monotonic) before which no connection is tried: the server takes no more, or is reached by TLS.
        self._connect_at = 0.0
        #: `_is_used`: the connection was of use since the last `rest`. `_rests`: close it once nothing is pending.
        self._is_used = self._rests = False
        #: `_start` starts ready jobs, in the main loop. `_wake_main` has the main loop call `send`. Set with the loop.
        self._start: Callable[[], None] = lambda: None
        self._wake_main: Callable[[], None] = lambda: None
        #: Time (monotonic) at which the ledger thread looks by itself. It sets this before it sleeps.
        self.looks_at = 0.0
        #: Time (monotonic) at which another thread asked the main loop to send; 0 once it did, or cannot.
        self._asked_at = 0.0

    # -- the main loop -------------------------------------------------------------------------------------------

    def attach(self, hub: Any, start: Callable[[], None], wake_main: Callable[[], None]) -> None:
        """Note that the main loop runs, with this hub."""
        self._start, self._wake_main, self._main = start, wake_main, threading.get_ident()
        self._watched, self._hub = None, hub

    def detach(self) -> None:
        """Note that the main loop runs no more: the ledger thread takes over."""
        self._hub, self._asked_at = None, 0.0
        self._wake_thread()

    def send(self) -> None:
        """Send the pending ends and arrivals, unless a call is under way. In the main loop."""
        self._asked_at = 0.0
        self._close_former()
        if self._flights or not self._is_pending():
            self._close_idle()
            return
        line, self._is_used = self._line, True
        if line is None or self._hub is None or not self._exclusive.acquire(blocking=False):
            self._wake_thread()
            return
        try:
            is_sent = self._send(line)
        except BaseException:
            # A signal that ends the worker raises an error anywhere in the main thread. A reply may be on its way.
            self.forget(line)
            self._exclusive.release()
            raise
        if not is_sent:
            self._exclusive.release()
            self._wake_thread()

    def _send(self, line: Line) -> bool:
        """Send the pending ends and arrivals; return False where the ledger thread is needed. Raises no `Exception`."""
        try:
            begun = self._begin()
            if begun is None:
                return False
            batch, settling = begun
            if line is not self._watched:
                self._hub.add_reader(line.fileno(), self._receive, line)
                self._watched = line
            self._ledger.send_settle(line, settling)
        except Exception as error:
            if not isinstance(error, PlatformError):
                logger.exception("the main loop cannot call the ledger")
            self.forget(line)
            return False
        self._flights.append(Flight(line, settling, batch, time.monotonic()))
        self._have_thread_look()
        return True

    def _receive(self, line: Line) -> None:
        """Take the reply, and start the jobs that it brings. In the main loop."""
        # A connection that is used no more may bring the reply to an earlier call.
        flight = self.take() if line is self._line else None
        if flight is None:
            self._leave_to_thread(line)
            return
        is_over = True
        try:
            settled = self._ledger.receive_settled(line, flight.settling)
            if settled is None:
                # The reply is not complete: the turn goes on.
                self._flights.append(flight)
                is_over = False
                return
            self._finish(flight.batch, settled, self._start)
        except Exception as error:
            # The thread asks again, and logs the error.
            if not isinstance(error, (PlatformError, LedgerClosed)):
                logger.exception("the ledger's answer could not be taken; it is asked again")
            self.forget(line)
            self._wake_thread()
        except BaseException:
            # The reply may still be unread.
            self.forget(line)
            raise
        finally:
            if is_over:
                self._exclusive.release()
        self.send()

    def _leave_to_thread(self, line: Line) -> None:
        """Watch a connection no more: the ledger thread reads the reply, or the server closed it."""
        if line is not self._awaited:
            self.forget(line)
            self._close_former()
        elif line is self._watched and self._hub is not None:
            self._watched = None
            self._hub.remove_reader(line.fileno())

    def _close_former(self) -> None:
        while self._former:
            line = self._former.popleft()
            if line is self._watched:
                self._watched = None
                if self._hub is not None:
                    self._hub.remove_reader(line.fileno())
            line.close()

    def _close_idle(self) -> None:
        rests, self._rests = self._rests, False
        if rests and not self._flights and self._line is not None:
            self.forget(self._line)
            self._close_former()

    # -- any thread ----------------------------------------------------------------------------------------------

    def rest(self) -> None:
        """Have the connection closed if it was of no use since the last call."""
        is_used, self._is_used = self._is_used, False
        if not is_used and self._line is not None:
            self._rests = True
            self._wake_main()

    def takes(self) -> bool:
        """Return True if the main loop settles the pending jobs now, False if the ledger thread has to."""
        if self._hub is None or self._line is None:
            return False
        if threading.get_ident() == self._main:
            self.send()
        else:
            self._asked_at = self._asked_at or time.monotonic()
            self._wake_main()
            self._have_thread_look()
        return True

    def _have_thread_look(self) -> None:
        """Make sure that the ledger thread looks soon, should the main loop be held up."""
        if self.looks_at > time.monotonic() + LATE:
            self.looks_at = 0.0
            self._wake_thread()

    def forget(self, line: Line) -> None:
        """Use a connection no more. The main loop closes it."""
        if self._line is line:
            self._line = None
        if line not in self._former:
            self._former.append(line)

    def take(self) -> Flight | None:
        """Return the call under way, and have its turn; None where there is none, or another thread has it."""
        try:
            return self._flights.popleft()
        except IndexError:
            return None

    # -- the ledger thread ---------------------------------------------------------------------------------------

    @property
    def is_under_way(self) -> bool:
        """Return True if the main loop has its turn, or is about to take it."""
        return bool(self._flights) or time.monotonic() - self._asked_at < LATE

    def take_late(self) -> Flight | None:
        """Return a call whose reply is late, or that the main loop will not take any more; None for no such call."""
        for flight in tuple(self._flights):
            if self._hub is None or time.monotonic() - flight.at >= LATE:
                self._awaited = flight.line
                return self.take()
        return None

    def wait_for(self, flight: Flight) -> Settled:
        """Wait for the reply to a call that was late, and finish it. Its connection is used no more."""
        try:
            settled: Settled | None = None
            while settled is None:
                settled = self._ledger.receive_settled(flight.line, flight.settling)
            self._finish(flight.batch, settled, None)
            return settled
        finally:
            self.forget(flight.line)
            self._awaited = None
            self._exclusive.release()

    def connect(self) -> None:
        """Give the main loop a connection where it has none. The ledger answered just now."""
        if self._hub is None or self._line is not None or time.monotonic() < self._connect_at:
            return
        self._connect_at = time.monotonic() + CONNECT_EVERY
        try:
            self._line = self._ledger.open_line()
        except PlatformError as error:
            logger.info("the main loop has no connection to the ledger: %s", error)
            return
        self._is_used = True
        self._connect_at = 0.0 if self._line is not None else math.inf

    def close(self) -> None:
        """Close the connection, since the thread ends and the main loop runs no more."""
        if self._line is not None:
            self.forget(self._line)
        while self._former:
            self._former.popleft().close()
