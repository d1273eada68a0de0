"""The feed of events: one thread hears what becomes of jobs, and hands it to all clients that follow.

The scripts of the ledger publish each transition on the channel of its job (`routing/inspect/job_events.py`). Where
Redis does not answer, or Postgres decides, the thread looks at Postgres each second, and compares. It runs only while
somebody follows.

An event has an id: the id of this feed, and a number. A client that comes again names the last id that it saw. It
gets the events since then, if the feed still has them. Else it gets `reset`, and reads the state anew.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from redis.exceptions import RedisError
from sqlalchemy import Engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from celery_capacity.platform.web.http.problems import TooManyRequests
from celery_capacity.routing.database.authority import read_authority
from celery_capacity.routing.errors import PlatformError
from celery_capacity.routing.inspect import job_events
from celery_capacity.routing.ledger import keys
from celery_capacity.routing.model.states import Store

#: Clients that may follow at once.
MAX_CLIENTS: Final = 100
#: Events that the feed keeps for clients that come again.
KEPT: Final = 5000
#: Events that wait for a slow client. With more, it gets `reset` instead.
MAX_PENDING: Final = 1000
#: Seconds for which the thread waits for a message before it looks whether anybody still follows.
PATIENCE: Final = 0.5
#: Seconds for which the thread goes on after the last client left, so that one which comes again misses nothing.
LINGER: Final = 30.0
#: Seconds between two looks at Postgres, and rows of a look.
LOOK: Final = 1.0
MAX_ROWS: Final = 500

_ROWS: Final = text("""
(SELECT id, state, attempt, epoch, step, worker, coalesce(started_at, admitted_at, submitted_at) AS at
 FROM jobs WHERE state IN ('accepted', 'waiting', 'admitted', 'running') ORDER BY seq DESC LIMIT :most)
UNION ALL
(SELECT id, state, attempt, epoch, step, worker, finished_at
 FROM jobs WHERE finished_at > clock_timestamp() - interval '10 s' ORDER BY finished_at DESC LIMIT :most)
""")


@dataclass(frozen=True, slots=True)
class Event:
    """A change, by kind.

    | kind | data |
    | --- | --- |
    | `job` | the job and its new state, as in the model `JobChanged` |
    | `cluster` | empty: something changed that is not a transition of one job |
    | `source` | the store that the events come from now; some may be missing before it |
    | `reset` | empty: events are missing, and the client reads the state anew |
    """

    id: str
    kind: str
    data: dict[str, Any]


class Follower:
    """Client that follows, on the loop that serves it."""

    def __init__(self) -> None:
        self.events: deque[Event] = deque()
        self.missed = False
        self.closed = False
        self._news = asyncio.Event()

    def put(self, event: Event) -> None:
        if len(self.events) >= MAX_PENDING:
            self.events.clear()
            self.missed = True
        else:
            self.events.append(event)
        self._news.set()

    def close(self) -> None:
        self.closed = True
        self._news.set()

    async def take(self, seconds: float) -> list[Event]:
        """Return what came, at most `seconds` later; [] for nothing."""
        try:
            await asyncio.wait_for(self._news.wait(), seconds)
        except TimeoutError:
            return []
        self._news.clear()
        events = list(self.events)
        self.events.clear()
        return events


class Feed:
    """Events for any number of followers. `client`: makes a client of Redis for the thread."""

    def __init__(self, client: Callable[[], Any], engine: Callable[[], Engine]) -> None:
        self._client = client
        self._engine = engine
        self._feed_id = secrets.token_hex(4)
        self._number = 0
        self._kept: deque[Event] = deque(maxlen=KEPT)
        self._followers: set[Follower] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()
        #: Held while the thread decides to end, and while a follower comes.
        self._lock = threading.Lock()
        self._until = 0.0
        self._seen: dict[str, tuple[int, int, int]] = {}
        #: the store that the events come from; None while none answers
        self.source: Store | None = None

    # -- on the loop

    def follow(self, last_id: str | None) -> Follower:
        """Return a follower, with the events after `last_id`. Raises `TooManyRequests`."""
        if len(self._followers) >= MAX_CLIENTS:
            advice = "Close a page or a program that follows the events."
            raise TooManyRequests(f"{MAX_CLIENTS} clients follow the events already", advice=advice)
        follower = Follower()
        with self._lock:
            self._followers.add(follower)
            if self._thread is None:
                self._start()
        if last_id is not None:
            since = self._since(last_id)
            for event in [self.reset()] if since is None else since:
                follower.put(event)
        elif self.source is not None:
            follower.put(Event(self.reset().id, "source", {"source": self.source.value}))
        return follower

    def leave(self, follower: Follower) -> None:
        self._until = time.monotonic() + LINGER
        self._followers.discard(follower)

    def close(self) -> None:
        """End all streams, and the thread."""
        self._ended.set()
        for follower in self._followers:
            follower.close()

    def reset(self) -> Event:
        """Return the event that has a client read the state anew."""
        return Event(f"{self._feed_id}-{self._number}", "reset", {})

    def _since(self, last_id: str) -> list[Event] | None:
        """Return the kept events after an id; None where some are missing."""
        feed_id, _, number = last_id.partition("-")
        if feed_id != self._feed_id or not (number.isascii() and number.isdigit()) or int(number) > self._number:
            return None
        missing = self._number - int(number)
        return list(self._kept)[len(self._kept) - missing :] if missing <= len(self._kept) else None

    def _start(self) -> None:
        # Nobody heard what happened since the last thread ended, so the ids of then are of no use.
        self._feed_id, self._number, self.source = secrets.token_hex(4), 0, None
        self._kept.clear()
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._hear, name="events", daemon=True)
        self._thread.start()

    def _publish(self, kind: str, data: dict[str, Any]) -> None:
        self._number += 1
        event = Event(f"{self._feed_id}-{self._number}", kind, data)
        self._kept.append(event)
        for follower in self._followers:
            follower.put(event)

    # -- on the thread

    def _say(self, kind: str, data: dict[str, Any]) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._publish, kind, data)

    @property
    def _wanted(self) -> bool:
        followed = bool(self._followers) or time.monotonic() < self._until
        return followed and not self._ended.is_set()

    def _hear(self) -> None:
        while True:
            with self._lock:
                if not self._wanted:
                    self._thread = None
                    return
            with suppress(RedisError, PlatformError):
                if not self._postgres_decides():
                    self._hear_ledger()
            if self._wanted:
                self._look_at_postgres()

    def _postgres_decides(self) -> bool:
        try:
            with self._engine().connect() as connection:
                return read_authority(connection).authority == Store.POSTGRES
        except (DBAPIError, PoolTimeout, PlatformError):
            return False

    def _hear_ledger(self) -> None:
        """Hand on the messages of the scripts, until nobody follows or Postgres decides. Raises `RedisError`."""
        client = self._client()
        try:
            channels = client.pubsub()
            channels.psubscribe(f"{keys.KEYS['job']}*")
            channels.subscribe(job_events.EPOCH_CHANNEL)
            while self._wanted:
                message = channels.get_message(timeout=PATIENCE)
                kind = None if message is None else message["type"]
                if kind == "subscribe":
                    # From here on nothing is missed.
                    self._come_from(Store.LEDGER)
                elif kind == "pmessage":
                    self._hand_on(message["channel"].decode("utf-8", "replace"), message["data"])
                elif kind == "message":
                    self._say("cluster", {})
                    if self._postgres_decides():
                        return
        finally:
            client.connection_pool.disconnect()

    def _hand_on(self, channel: str, message: bytes) -> None:
        job = channel.removeprefix(keys.KEYS["job"])
        try:
            event = job_events.parse(job, message)
        except ValueError:
            return
        if event is None:
            self._say("cluster", {})
        else:
            at = None if event.at is None else event.at.isoformat(timespec="milliseconds")
            self._say("job", _data(job, event.state, event.attempt, event.worker, at))

    def _come_from(self, source: Store | None) -> None:
        if source != self.source:
            self.source = source
            self._seen.clear()
            self._say("source", {"source": None if source is None else source.value})

    def _look_at_postgres(self) -> None:
        """Compare the rows with those of the look before, once."""
        try:
            with self._engine().connect() as connection:
                rows = connection.execute(_ROWS, {"most": MAX_ROWS}).all()
        except (DBAPIError, PoolTimeout, PlatformError):
            self._come_from(None)
        else:
            self._come_from(Store.POSTGRES)
            ranks = {row.id: (row.epoch, row.attempt, row.step) for row in rows}
            if self._seen:
                for row in rows:
                    if self._seen.get(row.id, (-1, -1, -1)) < ranks[row.id]:
                        at = None if row.at is None else row.at.isoformat(timespec="milliseconds")
                        self._say("job", _data(row.id, row.state, row.attempt, row.worker, at))
            self._seen = ranks or {"": (0, 0, 0)}
        self._ended.wait(LOOK)


def _data(job: str, state: str, attempt: int, worker: str | None, at: str | None) -> dict[str, Any]:
    return {"job": job, "state": str(state), "attempt": attempt, "worker": worker, "at": at}
