"""Warning of a sender whose jobs no registered worker could hold, however empty: it names the largest worker.

The common path asks nothing. Only where a job of a request has found no room for the first time in a while, a thread
reads the books once, beside the sender, and ends. Nothing is warned of while no worker is registered.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
import weakref
from collections.abc import Iterable
from typing import Final
from urllib.parse import unquote

import redis

from celery_capacity.routing import os_threads
from celery_capacity.routing.ledger import keys, snapshot
from celery_capacity.routing.model.reasons import Reason
from celery_capacity.routing.model.request import Request, split_shape, terms_of
from celery_capacity.routing.policy.feasibility import Shortfall, find_shortfall, kinds_of, with_named
from celery_capacity.routing.policy.placement import Book, asked_shape

logger = logging.getLogger(__name__)

#: Seconds between two checks of one request, and between two warnings of it.
CHECK_EVERY: Final = 60.0
WARN_EVERY: Final = 3600.0
#: Seconds for which the capacities of the workers are kept for the checks of other requests.
BOOKS_FOR: Final = 10.0
#: Most requests that are remembered. Beyond them all are forgotten, and checked again.
MAX_SHAPES: Final = 1000
#: Seconds for which a process waits for a check at its end, and before a fork.
PATIENCE: Final = 1.0


class FeasibilityCheck:
    """Check of the requests that one process submits. Thread-safe; not carried over a fork."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        #: Times (monotonic) from which a shape is checked again, and from which its request is warned of again.
        self._check_from: dict[str, float] = {}
        self._warn_from: dict[str, float] = {}
        self._waiting: list[str] = []
        self._thread: os_threads.Thread | None = None
        self._lock = threading.Lock()
        #: Registered workers, and one of each kind.
        self._books: list[Book] = []
        self._kinds: list[Book] = []
        self._books_until = float("-inf")
        _all.add(self)

    def note(self, shapes: Iterable[str]) -> None:
        """Note that jobs filed under these shapes may wait. A shape that was checked lately costs a look-up."""
        now = time.monotonic()
        fresh = [shape for shape in shapes if self._check_from.get(shape, 0.0) <= now]
        if fresh:
            self._begin(fresh, now)

    def finish(self, within: float = PATIENCE) -> None:
        """Wait for the checks under way, at most so many seconds."""
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(within)

    def _begin(self, shapes: Iterable[str], now: float) -> None:
        """Have a thread check these shapes."""
        with self._lock:
            if len(self._check_from) >= MAX_SHAPES:
                self._check_from.clear()
                self._warn_from.clear()
            for shape in shapes:
                if self._check_from.get(shape, 0.0) <= now:
                    self._check_from[shape] = now + CHECK_EVERY
                    self._waiting.append(shape)
            if self._thread is not None or not self._waiting:
                return
            thread = os_threads.Thread(target=self._run, name="feasibility", daemon=True)
            try:
                thread.start()
            except RuntimeError:
                # The system has no more threads for us, or the interpreter ends: nobody reads a warning then.
                self._waiting.clear()
                return
            self._thread = thread

    def _run(self) -> None:
        """Check shapes, in the thread, until none is left."""
        while shapes := self._take():
            try:
                self._check(shapes)
            except Exception as error:
                # A warning is no promise: the ledger may be away, or this role may not read its books.
                logger.debug("the requests of waiting jobs were not checked: %s", error)

    def _take(self) -> list[str]:
        with self._lock:
            shapes, self._waiting = self._waiting, []
            if not shapes:
                self._thread = None
            return shapes

    def _check(self, shapes: Iterable[str]) -> None:
        """Warn of those of these shapes that wait and that no registered worker could hold."""
        candidates = list(dict.fromkeys(shapes))
        # A paused shape may stand in the set of those alone that are held back.
        commands = [("ZSCORE", keys.SHAPES, shape) for shape in candidates]
        commands += [("SISMEMBER", keys.WITHHELD, shape) for shape in candidates]
        replies = snapshot.read_many(self._client, commands)
        rows = zip(candidates, replies[: len(candidates)], replies[len(candidates) :], strict=True)
        waiting = [shape for shape, score, withheld in rows if score is not None or withheld]
        books = self._registered() if waiting else []
        for shape in waiting:
            terms = terms_of(shape)
            kinds = with_named(books, self._books, terms)
            shortfall = find_shortfall(Request.from_shape(asked_shape(shape)), kinds, terms)
            if shortfall is not None:
                self._warn(shape, shortfall)

    def _registered(self) -> list[Book]:
        """Return a book of each kind of registered worker."""
        now = time.monotonic()
        if now >= self._books_until:
            opened, leases = snapshot.read_many(
                self._client, [("HGET", keys.EPOCH, "epoch"), ("ZRANGE", keys.LEASES, "0", "-1")]
            )
            books = snapshot.read_books(self._client, map(snapshot.text, leases)).values() if opened else ()
            current = int(opened or 0)
            self._books = [book.to_policy(0) for book in books if book.epoch == current]
            self._kinds = kinds_of(self._books)
            self._books_until = now + BOOKS_FOR
        return self._kinds

    def _warn(self, shape: str, shortfall: Shortfall) -> None:
        now = time.monotonic()
        if self._warn_from.get(shape, 0.0) > now:
            return
        self._warn_from[shape] = now + WARN_EVERY
        task = split_shape(shape).task
        request = Request.from_shape(asked_shape(shape))
        logger.warning(
            "%s (%s) %s. It waits until a worker that %s registers.",
            f"A job of {unquote(task)}" if task else "A job",
            request,
            shortfall,
            "is one" if shortfall.reason is Reason.NO_LABEL else "is large enough",
        )


_all: weakref.WeakSet[FeasibilityCheck] = weakref.WeakSet()


@atexit.register
def _finish_all() -> None:
    """Finish the checks under way: a program may end right after it sent its only job, or before a fork."""
    for check in list(_all):
        check.finish()


os.register_at_fork(before=_finish_all, after_in_child=_all.clear)
