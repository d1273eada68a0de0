"""Worker's pass over the backlog: it takes the jobs that fit, in order, or is kept for an exclusive job."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import NamedTuple

from celery_capacity.routing.model.amounts import ALONE
from celery_capacity.routing.model.request import Request
from celery_capacity.routing.policy.placement import Book, Waiting, fits
from celery_capacity.routing.policy.reservation import Reservation, after_start, passes, place_in_line
from celery_capacity.routing.policy.tenants import Sharing


class Filling(NamedTuple):
    """Result of a pass. `kept`: the shape for which the worker is kept from now on, "" for none."""

    admitted: list[Waiting]
    kept: str


def fill_or_keep(
    book: Book,
    backlog: Iterable[Waiting],
    most: int,
    elsewhere: Collection[str] = (),
    reservation: Reservation | None = None,
    now: int = 0,
    sharing: Sharing | None = None,
) -> Filling:
    """Fill a worker in one pass, or keep it for a shape; the shapes in `elsewhere` have a worker that is kept for them.

    The pass admits the first waiting job that fits, again and again, until none fits or `most` jobs are admitted. It
    also ends where the first waiting job must be alone and others run here: then the worker is kept for that job's
    shape.

    With `sharing`, the tenant's turn comes before the order of submission, and quotas hold (`tenants`).

    A kept worker takes only the shape that it is kept for, once it is empty. When that shape no longer waits, or would
    not fit, the worker is kept no more.
    """
    if not book.admitting or book.over or not (book.kept or book.open):
        return Filling([], book.kept)
    queues: dict[str, list[Waiting]] = {}
    if sharing is not None:
        backlog = sharing.admissible(backlog)
    # Ties go by the job's id, as Redis breaks them by the member's bytes.
    for waiting in sorted(backlog, key=lambda waiting: (waiting.order, waiting.job)):
        queues.setdefault(waiting.shape, []).append(waiting)
    looked_at = {shape: deque(queue) for shape, queue in queues.items()}
    if book.kept:
        first = queues.get(book.kept)
        if first and book.takes(first[0]) and fits(first[0].request, replace(book, allocated={})) is None:
            if not book.empty:
                return Filling([], book.kept)
            looked_at = {book.kept: deque(first)}
        book = replace(book, kept="")
        if not book.open:
            return Filling([], "")
    admitted: list[Waiting] = []
    while len(admitted) < most:
        possible = [
            (place_in_line(shape, queue[0].order, sharing), shape)
            for shape, queue in looked_at.items()
            if queue
            and _may_start(queue[0], book, elsewhere, reservation, now, sharing)
            and (sharing is None or sharing.may_start(queue[0]))
        ]
        if not possible:
            break
        shape = min(possible)[-1]
        if fits(looked_at[shape][0].request, book) is not None:
            return Filling(admitted, shape)
        waiting = looked_at[shape].popleft()
        admitted.append(waiting)
        book, reservation = book.holding(waiting.request), after_start(waiting, reservation, now)
        sharing = sharing and sharing.holding(shape, waiting.request)
    return Filling(admitted, "")


def _may_start(
    waiting: Waiting,
    book: Book,
    elsewhere: Collection[str],
    reservation: Reservation | None,
    now: int,
    sharing: Sharing | None,
) -> bool:
    """Return True if it is a job's turn on a worker: it starts there, or the worker is to be kept for it."""
    if not book.takes(waiting) or not passes(waiting, reservation, now, sharing):
        return False
    if fits(waiting.request, book) is None:
        return True
    return reservation is None and _keeps(waiting.shape, waiting.request, book, elsewhere)


def _keeps(shape: str, request: Request, book: Book, elsewhere: Collection[str]) -> bool:
    """Return True if a worker on which others run is to be kept for a request that must be alone."""
    if not request.get(ALONE) or shape in elsewhere or book.allocated.get(ALONE, 0):
        return False
    return fits(request, replace(book, allocated={})) is None
