"""Indexes of the ledger by resource: the workers that have a resource, by free CPUs, and the shapes that ask for it.

Beside them stands one index of all workers and one of all shapes. The functions read these indexes from Redis, and find
the places that differ from the books and the backlog.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import redis

from celery_capacity.routing.ledger import keys
from celery_capacity.routing.ledger.snapshot import JobCard, WorkerBook, text
from celery_capacity.routing.model.amounts import CPUS, MEMORY, ONLY_LABELLED
from celery_capacity.routing.model.request import Request
from celery_capacity.routing.policy.shape_indexes import asked_score, waits_beside
from celery_capacity.routing.policy.tenants import counted_amounts, tenant_of

#: The name of the index of all workers, beside the names of resources.
WHOLE = ""
#: Resources with an index of the amounts that waiting shapes ask for.
ASKED = (CPUS, MEMORY)


@dataclass(slots=True)
class Indexes:
    """Places as Redis has them.

    `free`: worker -> resource -> free millicores. `shapes`: resource -> shape -> order of its first job.
    """

    free: dict[str, dict[str, int]] = field(default_factory=dict)
    shapes: dict[str, dict[str, int]] = field(default_factory=dict)
    #: Of CPUs and memory: shape -> amount that it asks for, as `asked_score` says.
    asked: dict[str, dict[str, int]] = field(default_factory=dict)


def read_index_names(client: redis.Redis, workers: Iterable[str]) -> dict[str, list[str]]:
    """Return the resources in whose indexes these workers stand by their own books, in one round trip."""
    names = list(workers)
    pipe = client.pipeline(transaction=False)
    for worker in names:
        pipe.hget(keys.book(worker), "places")
    return {
        worker: text(value).split(",") if value else [] for worker, value in zip(names, pipe.execute(), strict=True)
    }


def ask(pipe: Any, worker: str, index_names: Iterable[str]) -> None:
    """Add to a pipeline the reads of a worker's places in these indexes and in the whole one.

    The pipeline reads the worker's book too, in one transaction. `note` takes the replies.
    """
    pipe.zscore(keys.FREE, worker)
    for resource in index_names:
        pipe.zscore(keys.free_of(resource), worker)


def note(indexes: Indexes, worker: str, index_names: Iterable[str], replies: Iterator[Any]) -> None:
    """Enter the replies to the reads of `ask` into `indexes`."""
    scores = {resource: next(replies) for resource in (WHOLE, *index_names)}
    indexes.free[worker] = {resource: int(score) for resource, score in scores.items() if score is not None}


def read_rest(client: redis.Redis, indexes: Indexes, resources: Iterable[str], beside: Iterable[str]) -> None:
    """Read the workers in an index that their own books do not name, and the indexes of shapes."""
    for resource in sorted(resources):
        standing: Any = client.zrange(keys.free_of(resource), 0, -1, withscores=True)
        for worker, free in standing:
            indexes.free.setdefault(text(worker), {}).setdefault(resource, int(free))
    for resource in sorted(beside):
        waiting: Any = client.zrange(keys.shapes_of(resource), 0, -1, withscores=True)
        indexes.shapes[resource] = {text(shape): int(order) for shape, order in waiting}
    for resource in ASKED:
        asking: Any = client.zrange(keys.asks(resource), 0, -1, withscores=True)
        indexes.asked[resource] = {text(shape): int(amount) for shape, amount in asking}


def wrong_workers(indexes: Indexes, books: Mapping[str, WorkerBook]) -> Iterator[str]:
    """Describe each place in the indexes of workers that differs from the books."""
    for worker, actual in sorted(indexes.free.items()):
        row = books.get(worker)
        book = None if row is None else replace(row.to_policy(0), admitting=row.is_ready)
        room = 0 if book is None else book.free(CPUS)
        expected = {}
        if book is not None and book.open:
            expected = {WHOLE: room, **{name: book.index_score(name) for name in book.index_names}}
        if WHOLE in expected and book is not None and book.capacity.get(ONLY_LABELLED) and book.index_names:
            expected[WHOLE] = -1
        for resource, _, score in _differing(expected, actual):
            index = "the index" if resource == WHOLE else f"the index of {resource}"
            yield f"worker {worker} has {room} free and stands as {score} in {index}"


def wrong_shapes(
    indexes: Indexes, first: Mapping[str, int | None], withheld: Collection[str] = frozenset()
) -> Iterator[str]:
    """Describe each place in the indexes of shapes that differs from the backlog.

    `first`: shape -> order of its first waiting job, None where no job waits. `withheld`: shapes that are not judged.
    """
    expected: dict[str, dict[str, int]] = {}
    for shape, order in first.items():
        if order is not None:
            expected.setdefault(waits_beside(shape), {})[shape] = order
    for resource in sorted(expected.keys() | indexes.shapes.keys()):
        actual = _without(indexes.shapes.get(resource, {}), withheld)
        for shape, at, there in _differing(expected.get(resource, {}), actual):
            yield f"shape {shape} begins at {at}, and at {there} in the index of {resource}"
    for resource in ASKED:
        wanted = {shape: asked_score(shape, resource) for shape, order in first.items() if order is not None}
        for shape, asked, there in _differing(wanted, _without(indexes.asked.get(resource, {}), withheld)):
            yield f"shape {shape} asks for {asked} of {resource}, and for {there} in its index"


def _without(scores: Mapping[str, int], names: Collection[str]) -> Mapping[str, int]:
    return {name: score for name, score in scores.items() if name not in names} if names else scores


def _differing(wanted: Mapping[str, int], actual: Mapping[str, int]) -> Iterator[tuple[str, int | None, int | None]]:
    for name in sorted(wanted.keys() | actual.keys()):
        if wanted.get(name) != actual.get(name):
            yield name, wanted.get(name), actual.get(name)


def read_use(client: redis.Redis) -> dict[str, int]:
    """Return what the counted jobs of each tenant hold, by tenant and resource, as the ledger has it."""
    fields: Any = client.hgetall(keys.USED)
    return {text(field): int(amount) for field, amount in fields.items() if int(amount)}


def use_of(cards: Iterable[JobCard]) -> dict[str, int]:
    """Return what the counted jobs among these hold, by tenant and resource."""
    use: Counter[str] = Counter()
    for card in cards:
        if card.counted and not card.is_tombstone and card.shape:
            for name, amount in counted_amounts(Request.from_shape(card.shape)).items():
                use[f"{tenant_of(card.shape)}/{name}"] += amount
    return {field: amount for field, amount in use.items() if amount}
