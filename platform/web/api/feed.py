"""The feed of events: one thread hears what becomes of jobs, and hands it to all clients that follow.

The changes come from `platform/web/transitions.py`. The thread runs only while somebody follows.

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
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Engine

from celery_capacity.platform.web.http.problems import TooManyRequests
from celery_capacity.platform.web.transitions import Transitions
from celery_capacity.routing.model.states import Store

#: Clients that may follow at once.
MAX_CLIENTS: Final = 100
#: Events that the feed keeps for clients that come again.
KEPT: Final = 5000
#: Events that wait for a slow client. With more, it gets `reset` instead.
MAX_PENDING: Final = 1000
#: Seconds for which the thread goes on after the last client left, so that one which comes again misses nothing.
LINGER: Final = 30.0


@dataclass(frozen=True, slots=True)
class Event:
    """A change, by kind.

    Kinds are those of `Transitions`, and `reset`, whose data are empty: events are missing, and the client reads the
    state anew.
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
        self._transitions = Transitions(
            lambda: self._client(), lambda: self._engine(), self._say, lambda: self._wanted, self._ended.wait
        )

    @property
    def source(self) -> Store | None:
        """Return the store that the events come from; None while none answers."""
        return self._transitions.source

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
        self._feed_id, self._number, self._transitions.source = secrets.token_hex(4), 0, None
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
            self._transitions.hear()
