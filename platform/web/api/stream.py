"""Events as a stream (Server-Sent Events), each with an id by which a client that comes again goes on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Final

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from celery_capacity.platform.web.api.feed import Event, Feed, Follower

#: Seconds without an event after which a `tick` keeps the connection open, and has a page show new ages.
TICK: Final = 5.0
#: Seconds between two events of a stream of mere changes.
PACE: Final = 0.25
#: Milliseconds after which a browser connects again.
RETRY_MS: Final = 1000


def text_of(event: Event) -> str:
    return f"id: {event.id}\nevent: {event.kind}\ndata: {json.dumps(event.data)}\n\n"


class EventStream(StreamingResponse):
    """Answer with the events of a follower, who leaves when it ends, also where it never began.

    `paced`: as of `stream`.
    """

    def __init__(self, feed: Feed, follower: Follower, *, paced: bool) -> None:
        super().__init__(
            stream(feed, follower, paced=paced),
            media_type="text/event-stream",
            headers={"X-Accel-Buffering": "no"},
        )
        self._feed = feed
        self._follower = follower

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._feed.leave(self._follower)


async def stream(feed: Feed, follower: Follower, *, paced: bool) -> AsyncIterator[str]:
    """Yield the events of a follower, until it or the feed is closed.

    `paced`: not each event, but at most one `changed` in `PACE` seconds, for a page that only reads again.
    """
    yield f"retry: {RETRY_MS}\n\n"
    while not follower.closed:
        events = await follower.take(TICK)
        if follower.missed:
            follower.missed = False
            events = [feed.reset()]
        if not events:
            yield "event: tick\ndata: {}\n\n"
        elif paced:
            yield text_of(Event(events[-1].id, "changed", {}))
            await asyncio.sleep(PACE)
        else:
            yield "".join(map(text_of, events))
