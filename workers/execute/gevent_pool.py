"""A worker whose pool is of greenlets (`-P gevent`): its threads, its loop, and what it makes of a greenlet's end.

Celery's main loop is another one there, without the events by which a worker of processes or threads hears of its jobs.
So the mailbox takes the messages (`workers.broker.ledger_queue`), as it does where the broker is not the ledger's, and
a greenlet starts what was claimed (`Starter`). The threads of the platform are the operating system's
(`routing.os_threads`).
"""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, Final

from celery import Celery, platforms, signals
from celery.concurrency import get_implementation
from celery.utils.dispatch import Signal as CelerySignal
from celery.worker import pidbox

from celery_capacity.routing import os_threads
from celery_capacity.routing.errors import Unsupported

logger = logging.getLogger(__name__)

#: Where Celery has the pool that is supported.
MODULE: Final = "celery.concurrency.gevent"
#: Signals that end a worker.
ENDING: Final = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGQUIT})


class Killed:
    """In place of what a body returned, of which gevent says nothing: its greenlet was killed."""


def check_pool(pool: Any) -> bool:
    """Whether a pool, given as Celery takes it (by name, or as a class), is of greenlets. Raises `Unsupported` for one
    that is not gevent's, and where gevent has not changed this process: all would be one thread then."""
    found = get_implementation(pool)
    if not getattr(found, "is_green", False):
        return False
    name = f"{found.__module__}:{found.__qualname__}"
    value = pool if isinstance(pool, str) else name
    if not any(base.__module__ == MODULE for base in found.__mro__):
        raise Unsupported(
            f"the pool {name} is not supported: its threads give way to each other only where they wait, and a job that"
            " computes would stop the worker's heartbeat",
            value=value,
            advice="For tasks that mostly wait use -P gevent -c 100, or -P threads -c 100, and cpus=0.01 on them; for"
            " others leave -P out.",
        )
    if not os_threads.is_green():
        raise Unsupported(
            f"the pool {name} was not named early enough: gevent changes the standard library before anything else is"
            " loaded, or not at all",
            value=value,
            advice="Start the worker with `celery -A ... worker -P gevent`; the setting worker_pool comes too late.",
        )
    return True


def prepare(app: Celery, drain: Callable[[], None]) -> None:
    """Before anything of the worker is made. `drain` is called in a signal's handler."""
    os_threads.install()
    platforms.signals.__class__ = Signals
    platforms.signals.drain = drain
    # On the main loop's own connection, as beside other pools: nothing else tells that the broker is gone. (Celery's
    # main loop may wait for a place in the pool; here that is the starter's affair.)
    pidbox.gPidbox = pidbox.Pidbox
    # Made before, and met by threads of the platform.
    app.clock.mutex = threading.Lock()
    for known in vars(signals).values():
        if isinstance(known, CelerySignal):
            known.lock = threading.Lock()
    # A backend has connections, which belong to the thread that made them.
    app.conf.result_backend_thread_safe = False
    app._backend_cache = None


class Signals(platforms.Signals):
    """Celery's handlers, which wait, and end jobs: where a signal comes nothing may wait, for it is gevent's loop or
    any job. So a greenlet does what they do; only that nothing is admitted any more need not wait for its turn."""

    drain: Callable[[], None]

    def __setitem__(self, name: str, handler: Any) -> None:
        super().__setitem__(name, self._in_greenlet(self.signum(name), handler) if callable(handler) else handler)

    def _in_greenlet(self, signum: int, handler: Callable[..., object]) -> Callable[..., None]:
        from gevent import spawn

        def begin(*args: Any) -> None:
            if signum in ENDING:
                self.drain()
            spawn(handler, *args)

        return begin


class Starter:
    """The greenlet that calls `start` whenever the descriptor can be read."""

    def __init__(self, descriptor: int, start: Callable[[], None]) -> None:
        self._descriptor = descriptor
        self._start = start
        self._greenlet: Any = None

    def begin(self) -> None:
        """Does nothing where it runs."""
        from gevent import spawn

        if self._greenlet is None:
            self._greenlet = spawn(self._run)

    def end(self) -> None:
        """It starts nothing any more, not even what it waits to find a place for."""
        if self._greenlet is not None:
            self._greenlet.kill()

    def _run(self) -> None:
        from gevent import get_hub

        hub = get_hub()
        readable = hub.loop.io(self._descriptor, 1)
        while True:
            hub.wait(readable)
            try:
                self._start()
            except Exception:
                # Whatever it was: without this greenlet nothing would start here.
                logger.exception("what was claimed could not be started; it is tried again with the next")


def was_killed(error: BaseException) -> bool:
    """Whether an exception is the end that a greenlet is given from outside."""
    greenlet = sys.modules.get("greenlet")
    return greenlet is not None and isinstance(error, greenlet.GreenletExit)


def problem_of(greenlet: Any) -> BaseException | None:
    """What ended a greenlet of the pool without a word to Celery; None where its body was heard of."""
    if greenlet.exception is not None:
        error: BaseException = greenlet.exception
        return error
    # (One that is killed before it begins returns what it was killed with.)
    value = greenlet.value
    return value if isinstance(value, BaseException) and was_killed(value) else None
