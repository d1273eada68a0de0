"""Fill free room that was left beside jobs which wait: the safety net behind submissions and releases.

A search by the indexes looks for room for each waiting shape, as for a new job. It costs the same in any cluster, and
finds nothing in a healthy one. Two cases need the books of the workers too. The search is bounded: it does not see all
workers where many of them lack the task, or a part of the request besides the scarcest resource. And it does not tell
which worker is to be kept for a job that must run alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Final

import redis

from celery_capacity.routing.errors import InvalidRequest
from celery_capacity.routing.ledger import keys, snapshot
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.ledger.snapshot import WorkerBook
from celery_capacity.routing.model.amounts import ALONE
from celery_capacity.routing.model.request import Request, alternatives_of, split_shape, terms_of
from celery_capacity.routing.policy.placement import Book, fits

#: Most smallest requests of a task that are judged. Where there are more, any worker that knows the task may have room.
MAX_SMALLEST: Final = 50
#: Books in one round trip.
CHUNK: Final = 200
#: Passes over all waiting shapes in one call. Each but the last admitted something.
MAX_PASSES: Final = 100


def fill_all(ledger: Ledger) -> int:
    """Fill all workers that have room for a waiting job, in the policy's order, and return the number admitted."""
    admitted = 0
    for _ in range(MAX_PASSES):
        unsure, unseen, before = [], [], admitted
        for shape, worker in ledger.find_room():
            if not worker:
                unsure.append(shape)
            elif filled := ledger.fill(worker):
                admitted += filled
            else:
                unseen.append(shape)
        if admitted == before:
            # `fill` does not see a shape whose place in an index was lost. A search for the shape's own job does.
            admitted += sum(len(ledger.place_shape(shape)) for shape in unseen)
            return admitted + sum(map(ledger.fill, with_room(ledger.client, unsure)))
    return admitted


def with_room(client: redis.Redis, shapes: Collection[str]) -> Iterator[str]:
    """Yield the workers in the index that may have room for a job of these shapes. Raises `RedisError`."""
    if not shapes:
        return
    by_kind: dict[tuple[str, str], list[str]] = defaultdict(list)
    for shape in shapes:
        by_kind[split_shape(shape).task, terms_of(shape)].append(shape)
    wanted = {kind: smallest(of_kind) for kind, of_kind in by_kind.items()}
    knowing: dict[tuple[str, str], bool] = {}
    names = [snapshot.text(name) for name in client.zrange(keys.FREE, 0, -1)]
    for start in range(0, len(names), CHUNK):
        books = snapshot.read_books(client, names[start : start + CHUNK])
        _ask_who_knows(client, knowing, books.values(), {task for task, _ in wanted})
        for name, book in books.items():
            policy = book.to_policy(0)
            kinds = [kind for kind in wanted if knowing[book.catalogue, kind[0]] and policy.allows(kind[1])]
            asked = [wanted[kind] for kind in kinds]
            if any(requests is None or may_take(policy, requests) for requests in asked):
                yield name


def _ask_who_knows(
    client: redis.Redis, knowing: dict[tuple[str, str], bool], books: Iterable[WorkerBook], tasks: Iterable[str]
) -> None:
    """Enter into `knowing` which catalogues of these workers have which tasks, in one round trip."""
    catalogues = {book.catalogue for book in books}
    pairs = [(catalogue, task) for catalogue in catalogues for task in tasks if (catalogue, task) not in knowing]
    pipe = client.pipeline(transaction=False)
    for catalogue, task in pairs:
        pipe.sismember(keys.tasks(catalogue), task)
    for (catalogue, task), has in zip(pairs, pipe.execute(), strict=True):
        knowing[catalogue, task] = bool(has) or not catalogue or not task


def smallest(shapes: Iterable[str]) -> list[Request] | None:
    """Return the minimal requests: a worker that has room for none of them has room for no request of these shapes.

    Return None where there are more than `MAX_SMALLEST`, or a shape is no valid request.
    """
    try:
        alternatives = {request for shape in shapes for request in alternatives_of(shape)}
    except InvalidRequest:
        return None
    requests = sorted(alternatives, key=lambda request: (sum(dict(request.amounts).values()), request.shape))
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
