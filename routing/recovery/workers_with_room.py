"""Find the workers that have room for any waiting job, so that no other worker is asked to fill up.

`fill` looks at each waiting shape for one worker. In a cluster without room that costs workers times shapes, and finds
nothing. Most shapes add nothing: where a shape fits, each smaller one does. So only the smallest shapes are judged,
against books that one pipeline reads.
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

#: Most shapes that are read, and most smallest ones that are judged. Where there are more, any worker may have room.
MAX_SHAPES: Final = 2000
MAX_SMALLEST: Final = 50
#: Books in one round trip.
CHUNK: Final = 200


def with_room(client: redis.Redis) -> Iterator[str]:
    """Yield the workers in the index that may have room for a waiting job. Raises `RedisError`."""
    shapes = client.zrange(keys.SHAPES, 0, MAX_SHAPES)
    if not shapes:
        return
    wanted = None if len(shapes) > MAX_SHAPES else smallest(map(snapshot.text, shapes))
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
    """Return the smallest of these requests: no other one asks for less of everything.

    Return None where there are more than `MAX_SMALLEST`, or a shape is no valid request.
    """
    try:
        requests = sorted(map(Request.from_shape, shapes), key=lambda request: sum(dict(request.amounts).values()))
    except InvalidRequest:
        return None
    minimal: list[Request] = []
    for request in requests:
        if any(_is_no_larger(other, request) for other in minimal):
            continue
        minimal = [other for other in minimal if not _is_no_larger(request, other)] + [request]
        if len(minimal) > MAX_SMALLEST:
            return None
    return minimal


def _is_no_larger(small: Request, large: Request) -> bool:
    """Return whether a worker that has room for the large request has room for the small one."""
    if (small.queue, small.get(ALONE)) != (large.queue, large.get(ALONE)):
        return False
    return all(amount <= large.get(name) for name, amount in small.amounts)


def may_take(book: Book, wanted: Sequence[Request]) -> bool:
    """Return True if a worker has room for one of the requests, or may be kept for one that must be alone there."""
    empty = replace(book, allocated={})
    return any(fits(request, empty if request.get(ALONE) else book) is None for request in wanted)
