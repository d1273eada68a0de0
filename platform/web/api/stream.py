"""Events as a stream (Server-Sent Events), each with an id by which a client that comes again goes on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Final

from celery_capacity.platform.web.api.feed import Event, Feed, Follower

#: Seconds without an event after which a `tick` keeps the connection open, and has a page show new ages.
TICK: Final = 5.0
#: Seconds between two events of a stream of mere changes.
PACE: Final = 0.25
#: Milliseconds after which a browser connects again.
RETRY_MS: Final = 1000


def text_of(event: Event) -> str:
    return f"id: {event.id}\nevent: {event.kind}\ndata: {json.dumps(event.data)}\n\n"


async def stream(feed: Feed, follower: Follower, *, paced: bool) -> AsyncIterator[str]:
    """Yield the events of a follower, until it or the feed is closed.

    `paced`: not each event, but at most one `changed` in `PACE` seconds, for a page that only reads again.
    """
    try:
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
    finally:
        feed.leave(follower)
