"""A circuit breaker: a server that is slow or silent costs its callers a moment once, not at each call.

The first failure *opens* the circuit: from then on nobody asks, and a thread looks by itself until an answer comes
quickly again, which *closes* it. While it is closed nothing looks.
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

logger = logging.getLogger(__name__)

#: Seconds above which an answer is slow: thousands of times what it takes, so that a busy machine does not matter.
SLOW: Final = 0.5
#: Seconds between two looks at a server that did not answer: doubled from the first to the last.
LOOK_AFTER: Final = 0.25
LOOK_AT_MOST: Final = 2.0


class Circuit:
    """Thread-safe. `ping` asks the server, in a thread, and raises where it does not answer. `opened` is what is logged
    when nobody asks any more, with the reason; `closed_again` when somebody does.

    A fork copies no thread: in the child the circuit begins anew, closed."""

    def __init__(self, ping: Callable[[], object], opened: str, closed_again: str) -> None:
        self._ping = ping
        self._opened = opened
        self._closed_again = closed_again
        self._lock = threading.Lock()
        self._open = False
        self._looking: os_threads.Thread | None = None
        self._ended = os_threads.Event()
        self._pid = os.getpid()

    @property
    def closed(self) -> bool:
        """Return whether the server is asked."""
        return not self._open or self._pid != os.getpid()

    def trip(self, why: str) -> None:
        """The server did not answer, or not quickly: ask it no more until a look at it succeeds."""
        if self._pid != os.getpid():
            self._lock, self._open, self._pid = threading.Lock(), False, os.getpid()
        with self._lock:
            if self._open:
                return
            self._open = True
            self._looking = os_threads.Thread(target=self._look, name="circuit", daemon=True)
        logger.warning("%s: %s", self._opened, why)
        self._looking.start()

    def stop(self, within: float) -> None:
        """End the thread where there is one."""
        self._ended.set()
        if self._looking is not None and self._pid == os.getpid():
            self._looking.join(within)

    def _look(self) -> None:
        """In a thread: until the server answers quickly."""
        pause = LOOK_AFTER
        while not self._ended.wait(pause):
            began = time.monotonic()
            try:
                self._ping()
                quick = time.monotonic() - began <= SLOW
            except (RedisError, OSError):
                quick = False
            except Exception:
                # Whatever it was: without this thread nobody would ever ask again.
                logger.exception("it could not be seen whether a server answers")
                quick = False
            if quick:
                logger.warning(self._closed_again)
                self._open = False
                return
            pause = min(2 * pause, LOOK_AT_MOST)
