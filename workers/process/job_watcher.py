"""Thread that hears what becomes of the jobs that a process watches, over one connection for all of them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any, Final

from redis.exceptions import RedisError

from celery_capacity.routing import os_threads
from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.inspect import job_events
from celery_capacity.routing.inspect.job_events import JobEvent
from celery_capacity.routing.ledger.connection import connect
from celery_capacity.routing.wake import Wake

logger = logging.getLogger(__name__)

#: Callback, in the watcher's thread: gets an event, or None where the job is to be looked at. It must not wait.
Tell = Callable[[JobEvent | None], object]

#: Seconds between two tries while Redis does not answer: doubled from the first to the last. At each try the watched
#: jobs are looked at in Postgres.
AGAIN_AFTER: Final = 0.5
AGAIN_AT_MOST: Final = 5.0
#: Seconds after which a silent connection is pinged. After twice as many it counts as dead.
SILENT_FOR: Final = 10.0
#: Seconds for which the thread stays when nothing is watched any more.
STAYS_FOR: Final = 30.0
#: Name of the connection in CLIENT LIST.
NAME: Final = "celery-capacity-watch"


class JobWatcher:
    """Watcher of jobs. Thread-safe. Its thread begins with the first watched job, and ends some time after the last."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._told: dict[str, list[Tell]] = {}
        self._jobs: dict[str, str] = {}
        self._wake = Wake()
        self._thread: os_threads.Thread | None = None
        self._pubsub: Any = None
        #: Channels to which this connection has been subscribed, and channels whose subscription was confirmed.
        self._asked: set[str] = set()
        self._subscribed: set[str] = set()
        self._heard_at = 0.0
        self._stays = True

    def watch(self, job: str, tell: Tell) -> None:
        """Call `tell` with each event of a job, and with None to have it looked at: at first, and after each gap."""
        name = job_events.channel(job)
        with self._lock:
            self._told.setdefault(name, []).append(tell)
            self._jobs[name] = job
            if self._thread is None:
                self._thread = os_threads.Thread(target=self._run, name="watch", daemon=True)
                self._thread.start()
            heard = name in self._subscribed
        if heard:
            tell(None)
        self._wake.set()

    def unwatch(self, job: str, tell: Tell) -> None:
        name = job_events.channel(job)
        with self._lock:
            listeners = self._told.get(name, [])
            if tell in listeners:
                listeners.remove(tell)
            if not listeners:
                self._told.pop(name, None)
                self._jobs.pop(name, None)
        self._wake.set()

    def close(self, timeout: float = 5.0) -> None:
        """End the thread and its connection. No callback of a watched job is called any more."""
        with self._lock:
            self._told, self._jobs, self._stays = {}, {}, False
            thread = self._thread
        self._wake.set()
        if thread is not None:
            thread.join(timeout)

    def descriptors(self) -> list[int]:
        """Return the descriptor of the socket, if there is one: for a child that inherited it."""
        sock = getattr(getattr(self._pubsub, "connection", None), "_sock", None)
        return [sock.fileno()] if sock is not None and sock.fileno() >= 0 else []

    # -- the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        client = connect(str(self._settings.redis_url), self._settings.store_timeout, client_name=NAME)
        pause = AGAIN_AFTER
        while self._goes_on():
            try:
                self._listen(client)
                pause = AGAIN_AFTER
                continue
            except (RedisError, OSError) as error:
                logger.info("jobs are looked at until Redis tells of them again: %s", error)
            except Exception:
                # The thread outlives any error: without it nobody would hear anything.
                logger.exception("watching failed; it begins anew")
            self._close()
            self._look_at_all()
            self._wake.wait(pause)
            pause = min(2 * pause, AGAIN_AT_MOST)
        self._close()
        client.close()

    def _goes_on(self) -> bool:
        if not self._told and self._stays:
            self._wake.wait(STAYS_FOR)
        with self._lock:
            if not self._told:
                self._thread = None
            return self._thread is not None

    def _listen(self, client: Any) -> None:
        """Subscribe to the channels that are watched now, and take messages until a wake-up or a silence."""
        if self._pubsub is None:
            self._pubsub = client.pubsub()
            self._pubsub.subscribe(job_events.EPOCH_CHANNEL)
            self._heard_at = time.monotonic()
        with self._lock:
            wanted = set(self._told)
            new, old = wanted - self._asked, self._asked - wanted
            self._subscribed -= old
        if new:
            self._pubsub.subscribe(*new)
        if old:
            self._pubsub.unsubscribe(*old)
        self._asked = wanted
        if not (descriptors := self.descriptors()):
            raise ConnectionError("the connection is gone")
        self._wake.wait_beside(descriptors[0], SILENT_FOR)
        self._hear_all()
        silent = time.monotonic() - self._heard_at
        if silent >= 2 * SILENT_FOR:
            raise ConnectionError(f"nothing was heard for {silent:.0f} s")
        if silent >= SILENT_FOR:
            self._pubsub.ping()

    def _hear_all(self) -> None:
        while (message := self._pubsub.get_message(timeout=0)) is not None:
            self._hear(message)

    def _hear(self, message: dict[str, Any]) -> None:
        self._heard_at = time.monotonic()
        name, kind = (message["channel"] or b"").decode(), message["type"]
        if name == job_events.EPOCH_CHANNEL:
            if kind == "message":
                self._look_at_all()
            return
        with self._lock:
            if kind == "subscribe":
                self._subscribed.add(name)
            listeners, job = list(self._told.get(name, ())), self._jobs.get(name)
        if job is None or kind not in ("subscribe", "message"):
            return
        event = job_events.parse(job, message["data"]) if kind == "message" else None
        for tell in listeners:
            tell(event)

    def _look_at_all(self) -> None:
        with self._lock:
            listeners = [tell for tells in self._told.values() for tell in tells]
        for tell in listeners:
            tell(None)

    def _close(self) -> None:
        if self._pubsub is not None:
            self._pubsub.close()
        self._pubsub, self._asked = None, set()
        with self._lock:
            self._subscribed = set()
