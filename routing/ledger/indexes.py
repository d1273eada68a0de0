"""The indexes of the ledger beside the whole ones: the workers that have a resource, by their free CPUs, and the shapes
that ask for one. How they stand in Redis, and what of it is not as books and backlog say.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import redis

from celery_capacity.routing.ledger import keys
from celery_capacity.routing.ledger.snapshot import WorkerBook, text
from celery_capacity.routing.model.amounts import CPUS, ONLY_LABELLED
from celery_capacity.routing.policy.placement import waits_beside

#: The name of the whole index beside those of resources.
WHOLE = ""


@dataclass(slots=True)
class Indexes:
    """Places as Redis has them.

    `free`: worker -> resource -> free millicores. `shapes`: resource -> shape -> order of its first job.
    """

    free: dict[str, dict[str, int]] = field(default_factory=dict)
    shapes: dict[str, dict[str, int]] = field(default_factory=dict)


def read_places(client: redis.Redis, workers: Iterable[str]) -> dict[str, list[str]]:
    """The resources in whose indexes these workers stand by their own books, in one round trip."""
    names = list(workers)
    pipe = client.pipeline(transaction=False)
    for worker in names:
        pipe.hget(keys.book(worker), "places")
    return {
        worker: text(places).split(",") if places else [] for worker, places in zip(names, pipe.execute(), strict=True)
    }


def ask(pipe: Any, worker: str, places: Iterable[str]) -> None:
    """Read with a worker's book, in one transaction, how it stands in these indexes and the whole one; `note` is given
    the replies."""
    pipe.zscore(keys.FREE, worker)
    for resource in places:
        pipe.zscore(keys.free_of(resource), worker)


def note(indexes: Indexes, worker: str, places: Iterable[str], replies: Iterator[Any]) -> None:
    """The replies to what `ask` asked."""
    scores = {resource: next(replies) for resource in (WHOLE, *places)}
    indexes.free[worker] = {resource: int(score) for resource, score in scores.items() if score is not None}


def read_rest(client: redis.Redis, indexes: Indexes, resources: Iterable[str], beside: Iterable[str]) -> None:
    """Who stands in an index of which its own book says nothing, and the indexes of shapes."""
    for resource in sorted(resources):
        standing: Any = client.zrange(keys.free_of(resource), 0, -1, withscores=True)
        for worker, free in standing:
            indexes.free.setdefault(text(worker), {}).setdefault(resource, int(free))
    for resource in sorted(beside):
        found: Any = client.zrange(keys.shapes_of(resource), 0, -1, withscores=True)
        indexes.shapes[resource] = {text(shape): int(order) for shape, order in found}


def wrong_places(indexes: Indexes, books: Mapping[str, WorkerBook]) -> Iterator[str]:
    """What the indexes of workers say and the books do not."""
    for worker, found in sorted(indexes.free.items()):
        book = books.get(worker)
        own = None if book is None else replace(book.to_policy(0), admitting=book.status == "ready")
        room = 0 if own is None else own.free(CPUS)
        expected = {} if own is None or not own.open else dict.fromkeys((WHOLE, *own.places), room)
        if WHOLE in expected and own is not None and own.capacity.get(ONLY_LABELLED) and own.places:
            expected[WHOLE] = -1
        for resource in sorted(found.keys() | expected.keys()):
            if found.get(resource) != expected.get(resource):
                place = "the index" if resource == WHOLE else f"the index of {resource}"
                yield f"worker {worker} has {room} free and stands as {found.get(resource)} in {place}"


def wrong_shapes(indexes: Indexes, first: Mapping[str, int | None]) -> Iterator[str]:
    """What the indexes of shapes say and the backlog does not. `first`: shape -> order of its first job, None: nothing
    waits."""
    expected: dict[str, dict[str, int]] = {}
    for shape, order in first.items():
        if order is not None:
            expected.setdefault(waits_beside(shape), {})[shape] = order
    for resource in sorted(expected.keys() | indexes.shapes.keys()):
        wanted, found = expected.get(resource, {}), indexes.shapes.get(resource, {})
        for shape in sorted(wanted.keys() | found.keys()):
            if wanted.get(shape) != found.get(shape):
                at, there = wanted.get(shape), found.get(shape)
                yield f"shape {shape} begins at {at}, and at {there} in the index of {resource}"
