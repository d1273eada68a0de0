"""Which workers have room for anything that waits: read and judged here, so that nobody else is asked to fill up.

`fill` looks at each waiting shape for one worker. In a cluster without room that is workers times shapes, and finds
nothing. Most shapes say nothing new: where one fits, each smaller one does. So the smallest of them are judged, against
the books, which one pipeline reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Final

import redis

from celery_capacity.routing.errors import InvalidRequest
from celery_capacity.routing.ledger import keys, snapshot
from celery_capacity.routing.model.amounts import ALONE
from celery_capacity.routing.model.request import Request
from celery_capacity.routing.policy.placement import Book, fits

#: Shapes that are read, and the smallest ones that are judged. Where there are more, every worker may have room.
MOST_SHAPES: Final = 2000
MOST_SMALLEST: Final = 50
#: Books in one round trip.
CHUNK: Final = 200


def with_room(client: redis.Redis) -> Iterator[str]:
    """Yield the workers in the index that may have room for something that waits. Raises `RedisError`."""
    shapes = client.zrange(keys.SHAPES, 0, MOST_SHAPES)
    if not shapes:
        return
    wanted = None if len(shapes) > MOST_SHAPES else smallest(map(snapshot.text, shapes))
    names = [snapshot.text(name) for name in client.zrange(keys.FREE, 0, -1)]
    for start in range(0, len(names), CHUNK):
        some = names[start : start + CHUNK]
        if wanted is None:
            yield from some
            continue
        for name, book in snapshot.read_books(client, some).items():
            if may_take(book.to_policy(0), wanted):
                yield name


def smallest(shapes: Iterable[str]) -> list[Request] | None:
    """Return the requests among these of which no other one asks for less of everything; None where they are too many,
    or one is none."""
    try:
        requests = sorted(map(Request.from_shape, shapes), key=lambda request: sum(dict(request.amounts).values()))
    except InvalidRequest:
        return None
    found: list[Request] = []
    for request in requests:
        if any(_is_within(other, request) for other in found):
            continue
        found = [other for other in found if not _is_within(request, other)] + [request]
        if len(found) > MOST_SMALLEST:
            return None
    return found


def _is_within(small: Request, large: Request) -> bool:
    """Return whether a worker that has room for the large request has room for the small one."""
    if (small.queue, small.get(ALONE)) != (large.queue, large.get(ALONE)):
        return False
    return all(amount <= large.get(name) for name, amount in small.amounts)


def may_take(book: Book, wanted: Sequence[Request]) -> bool:
    """Return True if a worker has room for one of the requests, or may be kept for one that must be alone there."""
    empty = replace(book, allocated={})
    return any(fits(request, empty if request.get(ALONE) else book) is None for request in wanted)
