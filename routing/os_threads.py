"""Threads of the operating system in a process whose own threads are greenlets (`celery worker -P gevent`).

gevent makes a greenlet of each thread, and greenlets give way to each other only where they wait. A body that computes,
or a driver that waits in C, would stop the heartbeat beside it. So the threads of the platform stay threads of the
operating system (`Thread`). The locks and connections that they share with greenlets are made to serve both
(`install`):

- Locks: a thread waits for gevent's lock by way of the loop that runs the greenlets, so for as long as one of them
  computes. `Lock` is the operating system's. A thread waits for it by itself, and a greenlet waits for it without
  stopping the others. Conditions, events and re-entrant locks are made of it, those of libraries too.
- Connections: a socket belongs to the loop of the thread that made it. `by_thread` keeps the connections of a pool
  apart.

Where gevent has changed nothing, all of this is `threading`, and `install` is never called.
"""

from __future__ import annotations

import _thread
import gc
import logging
import select
import sys
import threading
import weakref
from collections import deque
from functools import lru_cache
from typing import Any, Final

import redis


def is_green() -> bool:
    """Return True if gevent has made greenlets of this process's threads."""
    monkey = sys.modules.get("gevent.monkey")
    return monkey is not None and bool(monkey.is_module_patched("threading"))


def _original(module: Any, name: str) -> Any:
    """Return an attribute of a standard library module as it is, or as it was before gevent changed it."""
    if not is_green():
        return getattr(module, name)
    from gevent.monkey import get_original

    return get_original(module.__name__, name)


_allocate: Final = _original(_thread, "allocate_lock")
_start: Final = _original(_thread, "start_new_thread")
_ident: Final = _original(_thread, "get_ident")
_local: Final = _original(_thread, "_local")
_poll: Final = _original(select, "poll")
#: Class of re-entrant locks beside greenlets.
_Reentrant: Final[Any] = threading._PyRLock  # type: ignore[attr-defined]
#: Events that are made of the locks of `threading`; gevent's own event belongs to one loop.
Event: Final[type[threading.Event]] = _original(threading, "Event")

#: Identifiers of the threads that `Thread` started beside greenlets. Each change of the set is one atomic step.
_threads: Final[set[int]] = set()
#: True once `install` was called.
_installed = False


class Lock:
    """Lock like `threading.Lock`, shared by greenlets and threads of the operating system."""

    __slots__ = ("__weakref__", "_native", "_owner", "_waiting")

    def __init__(self) -> None:
        self._native: Any = _allocate()
        #: Identifier of the thread that took the lock last; 0 for none.
        self._owner = 0
        #: Waiters of the greenlets that wait for the lock, in any thread.
        self._waiting: deque[Any] = deque()

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        if self._native.acquire(False):
            self._owner = _ident()
            return True
        if not blocking:
            if timeout != -1:
                raise ValueError("can't specify a timeout for a non-blocking call")
            _give_way()
            return False
        hub = self._hub()
        got = self._native.acquire(True, timeout) if hub is None else self._wait(hub, timeout)
        if got:
            self._owner = _ident()
        return bool(got)

    def release(self) -> None:
        self._native.release()
        if self._waiting:
            self._wake()

    def locked(self) -> bool:
        return bool(self._native.locked())

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    def __repr__(self) -> str:
        return f"<{'locked' if self.locked() else 'unlocked'} {type(self).__module__}.Lock at {id(self):#x}>"

    def _at_fork_reinit(self) -> None:
        self._native._at_fork_reinit()
        self._owner = 0
        self._waiting.clear()

    def _hub(self) -> Any:
        """Return gevent's loop if other greenlets of this thread may run meanwhile, else None."""
        from gevent._hub_local import get_hub_if_exists
        from gevent.exceptions import BlockingSwitchOutError
        from greenlet import getcurrent

        if is_apart():
            return None
        hub = get_hub_if_exists()
        if hub is not None and getcurrent() is hub:
            if self._owner == _ident():
                raise BlockingSwitchOutError("a greenlet holds the lock that its own loop would wait for")
            return None
        return hub

    def _wait(self, hub: Any, timeout: float) -> bool:
        """Let the other greenlets run until the lock is free; return False if the timeout comes first."""
        from gevent import Timeout

        got = False
        # A loop with nothing to watch ends: it does not know of the threads that will release the lock.
        watched = hub.loop.async_()
        watched.start(_nothing)
        try:
            with Timeout(timeout if timeout >= 0 else None, False):
                while not got:
                    got = self._wait_once(hub)
        finally:
            watched.stop()
            watched.close()
        return got

    def _wait_once(self, hub: Any) -> bool:
        from gevent.hub import Waiter

        waiter = Waiter(hub)
        self._waiting.append(waiter)
        got = False
        try:
            # Try once more: a release before the append above saw no waiter.
            got = self._native.acquire(False)
            if not got:
                waiter.get()
                got = self._native.acquire(False)
            return bool(got)
        finally:
            try:
                self._waiting.remove(waiter)
            except ValueError:
                # A release has woken this waiter. If it leaves without the lock, the next waiter must look.
                if not got and not self._native.locked():
                    self._wake()

    def _wake(self) -> None:
        try:
            waiter = self._waiting.popleft()
        except IndexError:
            # The waiter saw by itself that the lock is free.
            return
        waiter.hub.loop.run_callback_threadsafe(waiter.switch, None)


def _nothing() -> None:
    """Do nothing: callback of a watcher that is never sent anything."""


def _give_way() -> None:
    """Let other greenlets run after a failed attempt, as gevent's own lock does.

    So a caller that tries again and again lets the holder run.
    """
    from gevent import sleep
    from gevent._hub_local import get_hub_if_exists
    from greenlet import getcurrent

    hub = get_hub_if_exists()
    if hub is not None and not is_apart() and getcurrent() is not hub:
        sleep(0)


class Thread(threading.Thread):
    """Thread of the platform, which is always one of the operating system.

    Derive from it, or pass `target`, as with `threading.Thread`.
    """

    #: Lock that is held while the thread runs beside greenlets.
    _runs: Any = None

    def start(self) -> None:
        if not _installed:
            super().start()
            return
        if self._runs is not None:
            raise RuntimeError("threads can only be started once")
        self._runs = _allocate()
        self._runs.acquire()
        _start(self._live, ())

    def _live(self) -> None:
        _threads.add(_ident())
        try:
            # `threading` does not know this thread, and gives it a number as its name.
            threading.current_thread().name = self.name
            self.run()
        except BaseException:
            threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), self)))
        finally:
            _leave_pools()
            _leave_loop()
            _threads.discard(_ident())
            self._runs.release()

    def is_alive(self) -> bool:
        return super().is_alive() if self._runs is None else bool(self._runs.locked())

    def join(self, timeout: float | None = None) -> None:
        """Wait until the thread ends.

        The greenlets wait too, which does no harm: a caller that ends a thread of the platform ends the worker.
        """
        if self._runs is None:
            super().join(timeout)
        elif self._runs.acquire(True, -1 if timeout is None else max(0.0, timeout)):
            self._runs.release()


def _leave_loop() -> None:
    """End the loop that gevent made for this thread, if the thread used a socket.

    Nobody else ends it, and it has files and a thread of its own.
    """
    from gevent import _hub_local

    hub = _hub_local.get_hub_if_exists()
    if hub is not None:
        hub.destroy(destroy_loop=True)


def is_apart() -> bool:
    """Return True if this thread is one of the platform's beside greenlets."""
    return _ident() in _threads


def start_thread(target: Any) -> None:
    """Run `target` in a thread of the operating system, whether or not the process called `install`.

    `target` may use nothing that gevent has changed.
    """
    _start(target, ())


def allocate_lock() -> Any:
    """Return a lock of the operating system; a greenlet that waits for it stops the others."""
    return _allocate()


def poll() -> Any:
    """Return a `select.poll()` that lets other greenlets run while a greenlet waits in it."""
    return _poll() if is_apart() else select.poll()


def install() -> None:
    """Make locks serve threads and greenlets alike from here on, in a process where gevent was first.

    Threads of the platform that start later are the operating system's.
    """
    global _installed
    for module, names in ((threading, ("Lock", "_allocate_lock")), (_thread, ("allocate_lock",))):
        for name in names:
            setattr(module, name, Lock)
    # Change the locks that exist already, and those that every thread meets. A re-entrant lock is on every class with a
    # property that kombu caches. A held lock stays as it is.
    for instance in gc.get_objects():
        if type(instance) is _Reentrant and instance._owner is None:
            instance._block = Lock()
    threading._active_limbo_lock = Lock()  # type: ignore[attr-defined]
    logging._lock = threading.RLock()  # type: ignore[attr-defined]
    for reference in logging._handlerList:  # type: ignore[attr-defined]
        if (handler := reference()) is not None:
            handler.createLock()
    _installed = True


# -- connections -----------------------------------------------------------------------------------------------------


class _IdleOfThread(_local):  # type: ignore[misc, valid-type]
    """Idle connections and pools of one thread of the operating system."""

    def __init__(self) -> None:
        self.idle: list[Any] = []
        self.pools: weakref.WeakSet[Any] = weakref.WeakSet()


_mine: Final = _IdleOfThread()


class _ByThread:
    """Mixin for a pool of redis-py: each thread has its own list of idle connections."""

    @property
    def _available_connections(self) -> list[Any]:
        mine: _IdleOfThread = self.__dict__["_mine"]
        if not mine.idle:
            _mine.pools.add(self)
        return mine.idle

    @_available_connections.setter
    def _available_connections(self, _: list[Any]) -> None:
        self.__dict__["_mine"] = _IdleOfThread()


@lru_cache(maxsize=8)
def _by_thread_class(base: type) -> type:
    return type(f"{base.__name__}ByThread", (_ByThread, base), {})


def by_thread(client: redis.Redis) -> redis.Redis:
    """Return the client, whose pool then keeps connections apart by thread beside greenlets.

    The client must not have connections yet.
    """
    if is_green():
        pool: Any = client.connection_pool
        del pool._available_connections
        kind: type = type(pool)
        pool.__class__ = _by_thread_class(kind)
        pool._available_connections = []
    return client


def _leave_pools() -> None:
    """Close the idle connections of a thread that ends; no other thread could use them."""
    for pool in list(_mine.pools):
        pool.disconnect(inuse_connections=False)
    _mine.pools.clear()
