"""A circuit breaker: a server that is slow or silent costs its callers a moment once, not at each call.

The first failure *opens* the circuit. From then on nobody asks, and a thread looks by itself. The circuit *closes* when
an answer comes quickly again. While it is closed, nothing looks.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Final

from redis.exceptions import RedisError

from celery_capacity.routing import os_threads
from celery_capacity.routing.errors import StoreUnavailable

logger = logging.getLogger(__name__)

#: Seconds above which an answer is slow: thousands of times the usual time, so that a busy machine does not matter.
SLOW: Final = 0.5
#: Seconds between two looks at a server that did not answer. The first pause is doubled up to the last.
LOOK_AFTER: Final = 0.25
LOOK_AT_MOST: Final = 2.0


class Circuit:
    """Circuit breaker of one server. Thread-safe.

    `ping` asks the server, in a thread, and raises where it does not answer. `opened` is logged, with the reason, when
    nobody asks any more. `closed_again` is logged when callers ask again, and `on_closed` is called, in that thread.

    A fork copies no thread: in the child the circuit begins anew, closed.
    """

    def __init__(
        self,
        ping: Callable[[], object],
        opened: str,
        closed_again: str,
        on_closed: Callable[[], object] = lambda: None,
    ) -> None:
        self._ping = ping
        self._on_closed = on_closed
        self._opened = opened
        self._closed_again = closed_again
        self._lock = threading.Lock()
        self._open = False
        self._looking: os_threads.Thread | None = None
        self._ended = os_threads.Event()
        self._pid = os.getpid()

    @property
    def closed(self) -> bool:
        """Return True if the server is asked."""
        return not self._open or self._pid != os.getpid()

    def trip(self, why: str) -> None:
        """Open the circuit, so that nobody asks the server until a look at it succeeds.

        Callers trip it when the server did not answer, or not quickly. `why` is logged.
        """
        if self._pid != os.getpid():
            self._lock, self._open, self._pid = threading.Lock(), False, os.getpid()
        with self._lock:
            if self._open:
                return
            self._open = True
            self._looking = os_threads.Thread(target=self._look, name="circuit", daemon=True)
        logger.warning("%s: %s", self._opened, why)
        self._looking.start()

    def call(self) -> _Call:
        """Return the block in which a caller asks the server.

        A failure of the server opens the circuit, and ends the block without an error. So does a slow answer.
        """
        return _Call(self)

    def stop(self, within: float) -> None:
        """End the thread where there is one, within so many seconds."""
        self._ended.set()
        if self._looking is not None and self._pid == os.getpid():
            self._looking.join(within)

    def _look(self) -> None:
        """Look at the server, in a thread, until it answers quickly."""
        pause = LOOK_AFTER
        while not self._ended.wait(pause):
            began = time.monotonic()
            try:
                self._ping()
                quick = time.monotonic() - began <= SLOW
            except (RedisError, OSError):
                quick = False
            except Exception:
                # Go on after any error: without this thread nobody would ever ask again.
                logger.exception("the look at a server that did not answer failed; it is repeated")
                quick = False
            if quick:
                logger.warning(self._closed_again)
                self._open = False
                self._on_closed()
                return
            pause = min(2 * pause, LOOK_AT_MOST)


class _Call:
    """Block of one call to a server, which opens the circuit where the server fails or is slow."""

    __slots__ = ("_began", "_circuit")

    def __init__(self, circuit: Circuit) -> None:
        self._circuit = circuit

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> bool:
        if isinstance(error, (StoreUnavailable, RedisError)):
            self._circuit.trip(str(error))
            return True
        if error is None and (took := time.monotonic() - self._began) > SLOW:
            self._circuit.trip(f"an answer took {took:.1f} s")
        return False
