"""Worker's pass over the backlog: it takes the jobs that fit, in order, or is kept for an exclusive job."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import NamedTuple

from celery_capacity.routing.model.amounts import ALONE, DEFAULT_QUEUE, LABEL
from celery_capacity.routing.model.request import Request
from celery_capacity.routing.policy.placement import Book, Waiting, fits, waits_beside


class Filling(NamedTuple):
    """Result of a pass. `kept`: the shape for which the worker is kept from now on, "" for none."""

    admitted: list[Waiting]
    kept: str


def fill(book: Book, backlog: Iterable[Waiting], shapes: int, most: int) -> list[Waiting]:
    """Return the jobs that a release or a registration on `book` admits, in order: one pass of a script."""
    return fill_or_keep(book, backlog, shapes, most).admitted


def fill_or_keep(
    book: Book, backlog: Iterable[Waiting], shapes: int, most: int, elsewhere: Collection[str] = ()
) -> Filling:
    """Fill a worker in one pass, or keep it for a shape; the shapes in `elsewhere` have a worker that is kept for them.

    The pass looks at the first `shapes` shapes, in the order of their first jobs. Behind these it looks at the first
    `shapes` shapes that wait beside a resource of the worker, or for its default queue. Again and again it admits the
    first waiting job of these that fits, until none fits or `most` jobs are admitted. It also ends at the turn of a job
    that must be alone here while others run: then the worker is kept for that job's shape.

    A kept worker takes only the shape that it is kept for, once it is empty. When that shape no longer waits, or would
    not fit, the worker is kept no more.
    """
    if not book.admitting or book.over or not (book.kept or book.open):
        return Filling([], book.kept)
    queues: dict[str, list[Waiting]] = {}
    # Ties go by the job's id, as Redis breaks them by the member's bytes.
    for waiting in sorted(backlog, key=lambda waiting: (waiting.order, waiting.job)):
        queues.setdefault(waiting.shape, []).append(waiting)
    heads = [(queue[0].order, shape) for shape, queue in queues.items()]
    in_order = [shape for _, shape in sorted(heads)]
    behind = [shape for shape in in_order[shapes:] if _stands_by(book, queues[shape][0].request)]
    looked_at = {shape: deque(queues[shape]) for shape in [*in_order[:shapes], *behind[:shapes]]}
    if book.kept:
        first = queues.get(book.kept)
        if first and book.knows(first[0].task) and fits(first[0].request, replace(book, allocated={})) is None:
            if not book.empty:
                return Filling([], book.kept)
            looked_at = {book.kept: deque(first)}
        book = replace(book, kept="")
        if not book.open:
            return Filling([], "")
    admitted: list[Waiting] = []
    while len(admitted) < most:
        possible = [
            (queue[0].order, shape)
            for shape, queue in looked_at.items()
            if queue
            and book.knows(queue[0].task)
            and (fits(queue[0].request, book) is None or _keeps(shape, queue[0].request, book, elsewhere))
        ]
        if not possible:
            break
        shape = min(possible)[1]
        if fits(looked_at[shape][0].request, book) is not None:
            return Filling(admitted, shape)
        waiting = looked_at[shape].popleft()
        admitted.append(waiting)
        book = book.holding(waiting.request)
    return Filling(admitted, "")


def _stands_by(book: Book, request: Request) -> bool:
    """Return True if a worker looks for waiting jobs in the index that has the request's shape."""
    index_name = waits_beside(request.shape)
    return index_name in book.index_names or (index_name == LABEL + DEFAULT_QUEUE and book.serves(request))


def _keeps(shape: str, request: Request, book: Book, elsewhere: Collection[str]) -> bool:
    """Return True if a worker on which others run is to be kept for a request that must be alone."""
    if not request.get(ALONE) or shape in elsewhere or book.allocated.get(ALONE, 0):
        return False
    return fits(request, replace(book, allocated={})) is None
