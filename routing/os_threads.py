"""Threads of the operating system in a process whose own threads are greenlets (`celery worker -P gevent`).

gevent makes a greenlet of each thread, and greenlets give way to each other only where they wait: a body that computes,
and a driver that waits in C, would stop the heartbeat beside it. So the threads of the platform stay what they were
(`Thread`), and what they share with greenlets is made to serve both (`install`):

- locks: a thread waits for gevent's by way of the loop that runs the greenlets, so for as long as one of them computes.
  `Lock` is the operating system's, for which a thread waits by itself, and for which a greenlet waits without stopping
  the others. Conditions, events and re-entrant locks are made of it, those of libraries too.
- connections: a socket belongs to the loop of the thread that made it. `by_thread` keeps a pool's apart.

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
    """Whether gevent has made greenlets of this process's threads."""
    monkey = sys.modules.get("gevent.monkey")
    return monkey is not None and bool(monkey.is_module_patched("threading"))


def _original(module: Any, name: str) -> Any:
    """What the standard library has, or had before gevent changed it."""
    if not is_green():
        return getattr(module, name)
    from gevent.monkey import get_original

    return get_original(module.__name__, name)


_allocate: Final = _original(_thread, "allocate_lock")
_start: Final = _original(_thread, "start_new_thread")
_ident: Final = _original(_thread, "get_ident")
_local: Final = _original(_thread, "_local")
_poll: Final = _original(select, "poll")
#: Re-entrant locks beside greenlets.
_Reentrant: Final[Any] = threading._PyRLock  # type: ignore[attr-defined]
#: Made of what `threading` has for locks; gevent's own belongs to one loop.
Event: Final[type[threading.Event]] = _original(threading, "Event")

#: Identifiers of the threads that `Thread` started beside greenlets. (Changed by one step at a time.)
_threads: Final[set[int]] = set()
#: Whether `install` was called.
_installed = False


class Lock:
    """As `threading.Lock`, between greenlets and threads of the operating system."""

    __slots__ = ("__weakref__", "_native", "_owner", "_waiting")

    def __init__(self) -> None:
        self._native: Any = _allocate()
        #: The thread that took it last.
        self._owner = 0
        #: Of greenlets that wait for it, in any thread.
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
        """gevent's loop, where other greenlets of this thread may run meanwhile."""
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
        """In a greenlet: let the others run until the lock is free."""
        from gevent import Timeout

        got = False
        # A loop with nothing to watch ends, and knows nothing of threads that will release the lock.
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
            # Once more: who released it before this line saw nobody waiting.
            got = self._native.acquire(False)
            if not got:
                waiter.get()
                got = self._native.acquire(False)
            return bool(got)
        finally:
            try:
                self._waiting.remove(waiter)
            except ValueError:
                # It was woken; where it goes without the lock, the next one is to look.
                if not got and not self._native.locked():
                    self._wake()

    def _wake(self) -> None:
        try:
            waiter = self._waiting.popleft()
        except IndexError:
            # It saw by itself that the lock is free.
            return
        waiter.hub.loop.run_callback_threadsafe(waiter.switch, None)


def _nothing() -> None:
    """What a watcher calls that is never sent anything."""


def _give_way() -> None:
    """As gevent's own lock does after a look: who looks again and again lets the holder run."""
    from gevent import sleep
    from gevent._hub_local import get_hub_if_exists
    from greenlet import getcurrent

    hub = get_hub_if_exists()
    if hub is not None and not is_apart() and getcurrent() is not hub:
        sleep(0)


class Thread(threading.Thread):
    """A thread of the platform's: one of the operating system, whatever others are. What it is to run is said by
    deriving from it, or by `target`, as with `threading.Thread`."""

    #: Held while it runs beside greenlets.
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
            # (A stranger to `threading`, which gives it a number.)
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
        """Greenlets wait with it: whoever ends a thread of the platform ends the worker."""
        if self._runs is None:
            super().join(timeout)
        elif self._runs.acquire(True, -1 if timeout is None else max(0.0, timeout)):
            self._runs.release()


def _leave_loop() -> None:
    """End the loop that gevent made for this thread, if it used a socket: nobody else does, and it has files and a
    thread of its own."""
    from gevent import _hub_local

    hub = _hub_local.get_hub_if_exists()
    if hub is not None:
        hub.destroy(destroy_loop=True)


def is_apart() -> bool:
    """Whether this thread is one of the platform's beside greenlets."""
    return _ident() in _threads


def start_thread(target: Any) -> None:
    """Run `target` in a thread of the operating system, in a process that called `install` and in one that did not. It
    may use nothing that gevent has changed."""
    _start(target, ())


def allocate_lock() -> Any:
    """Return a lock of the operating system: a greenlet that waits for it stops the others."""
    return _allocate()


def poll() -> Any:
    """`select.poll()`, which in a greenlet lets the others run."""
    return _poll() if is_apart() else select.poll()


def install() -> None:
    """Make locks serve threads and greenlets alike, from here on in this process, where gevent was in it first. Threads
    of the platform that start later are the operating system's."""
    global _installed
    for module, names in ((threading, ("Lock", "_allocate_lock")), (_thread, ("allocate_lock",))):
        for name in names:
            setattr(module, name, Lock)
    # What is there already, and what every thread meets. (Re-entrant ones are on every class that has a property which
    # kombu keeps; one that is held stays.)
    for found in gc.get_objects():
        if type(found) is _Reentrant and found._owner is None:
            found._block = Lock()
    threading._active_limbo_lock = Lock()  # type: ignore[attr-defined]
    logging._lock = threading.RLock()  # type: ignore[attr-defined]
    for reference in logging._handlerList:  # type: ignore[attr-defined]
        if (handler := reference()) is not None:
            handler.createLock()
    _installed = True


# -- connections -----------------------------------------------------------------------------------------------------


class _Mine(_local):  # type: ignore[misc, valid-type]
    """What belongs to one thread of the operating system."""

    def __init__(self) -> None:
        self.idle: list[Any] = []
        self.pools: weakref.WeakSet[Any] = weakref.WeakSet()


_mine: Final = _Mine()


class _ByThread:
    """In front of a pool of redis-py, which keeps what is not used in a list: each thread has a list of its own."""

    @property
    def _available_connections(self) -> list[Any]:
        mine: _Mine = self.__dict__["_mine"]
        if not mine.idle:
            _mine.pools.add(self)
        return mine.idle

    @_available_connections.setter
    def _available_connections(self, _: list[Any]) -> None:
        self.__dict__["_mine"] = _Mine()


@lru_cache(maxsize=8)
def _by_thread_class(base: type) -> type:
    return type(f"{base.__name__}ByThread", (_ByThread, base), {})


def by_thread(client: redis.Redis) -> redis.Redis:
    """The client, which has no connections yet; beside greenlets each thread then has its own."""
    if is_green():
        pool: Any = client.connection_pool
        del pool._available_connections
        kind: type = type(pool)
        pool.__class__ = _by_thread_class(kind)
        pool._available_connections = []
    return client


def _leave_pools() -> None:
    """A thread ends: close what only it could use."""
    for pool in list(_mine.pools):
        pool.disconnect(inuse_connections=False)
    _mine.pools.clear()
