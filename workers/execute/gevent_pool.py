"""Worker whose pool is of greenlets (`-P gevent`): its threads, its loop, and the meaning of a greenlet's end.

Such a worker has another main loop of Celery's, without the events that tell a worker of processes or threads of its
jobs. So a thread takes the messages (`workers.broker.ledger_queue`), as it does where the broker is not the ledger's. A
greenlet starts the claimed jobs (`Starter`). The threads of the platform are the operating system's
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

#: Celery's module of the supported pool.
MODULE: Final = "celery.concurrency.gevent"
#: Signals that end a worker.
ENDING: Final = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGQUIT})


class Killed:
    """Stand-in for the value of a body whose greenlet was killed: gevent reports no value and no error of it."""


def check_pool(pool: Any) -> bool:
    """Return True if a pool is of greenlets. `pool`: its name or its class, as Celery takes it.

    Raises `Unsupported` for a pool of greenlets that is not gevent's. Raises it also where gevent has not changed this
    process: all would be one thread then.
    """
    pool_class = get_implementation(pool)
    if not getattr(pool_class, "is_green", False):
        return False
    name = f"{pool_class.__module__}:{pool_class.__qualname__}"
    value = pool if isinstance(pool, str) else name
    if not any(base.__module__ == MODULE for base in pool_class.__mro__):
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
    """Prepare the process before any part of the worker is made. `drain` is called in a signal's handler."""
    os_threads.install()
    platforms.signals.__class__ = Signals
    platforms.signals.drain = drain
    # Remote control uses the main loop's own connection, as with other pools: only by this connection the loop notices
    # that the broker is gone. The loop may use it, because the starter waits for a place in the pool, not the loop.
    pidbox.gPidbox = pidbox.Pidbox
    # These locks were made before, and the platform's threads meet them.
    app.clock.mutex = threading.Lock()
    for celery_signal in vars(signals).values():
        if isinstance(celery_signal, CelerySignal):
            celery_signal.lock = threading.Lock()
    # A backend has connections, which belong to the thread that made them.
    app.conf.result_backend_thread_safe = False
    app._backend_cache = None


class Signals(platforms.Signals):
    """Celery's handlers of signals, each run in a greenlet.

    These handlers wait, and end jobs. But a signal comes in gevent's loop or in any job, where nothing may wait. So a
    greenlet runs the handler. Only the drain, after which nothing is admitted any more, need not wait for its turn.
    """

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
    """Greenlet that calls `start` whenever the descriptor can be read."""

    def __init__(self, descriptor: int, start: Callable[[], None]) -> None:
        self._descriptor = descriptor
        self._start = start
        self._greenlet: Any = None

    def begin(self) -> None:
        """Start the greenlet. Does nothing where it runs."""
        from gevent import spawn

        if self._greenlet is None:
            self._greenlet = spawn(self._run)

    def end(self) -> None:
        """End the greenlet: it starts no other job, not even one that waits for a place in the pool."""
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
                # The greenlet outlives any error: without it this worker would start nothing.
                logger.exception("claimed jobs could not be started; they are tried again with the next one")


def was_killed(error: BaseException) -> bool:
    """Return True if an exception is the end that a greenlet is given from outside."""
    greenlet = sys.modules.get("greenlet")
    return greenlet is not None and isinstance(error, greenlet.GreenletExit)


def problem_of(greenlet: Any) -> BaseException | None:
    """Return the error that ended a greenlet of the pool unknown to Celery, None where Celery heard of its body."""
    if greenlet.exception is not None:
        error: BaseException = greenlet.exception
        return error
    # A greenlet that is killed before it begins returns the exception that killed it.
    value = greenlet.value
    return value if isinstance(value, BaseException) and was_killed(value) else None
