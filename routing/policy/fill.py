"""Worker's pass over the backlog: it takes the jobs that fit, in order, or is kept for an exclusive job.

A job with alternatives takes the first that may start: on any worker for a new job, on the worker of a pass for others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import NamedTuple

from celery_capacity.routing.model.amounts import ALONE
from celery_capacity.routing.model.reasons import Reason
from celery_capacity.routing.policy.placement import Admission, Book, Refusal, Waiting, choose, fits
from celery_capacity.routing.policy.reservation import Reservation, after_start, first_fitting, place_in_line
from celery_capacity.routing.policy.tenants import Sharing, within_quota


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
        if first and book.takes(first[0]) and _fits_empty(first[0], book, sharing):
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
            if queue and _may_start(queue[0], book, elsewhere, reservation, now, sharing)
        ]
        if not possible:
            break
        shape = min(possible)[-1]
        starting = first_fitting(looked_at[shape][0], book, reservation, now, sharing)
        if starting is None:
            return Filling(admitted, shape)
        looked_at[shape].popleft()
        admitted.append(starting)
        book, reservation = book.holding(starting.request), after_start(starting, reservation, now)
        sharing = sharing and sharing.holding(shape, starting.request)
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
    if not book.takes(waiting):
        return False
    if first_fitting(waiting, book, reservation, now, sharing) is not None:
        return True
    return reservation is None and _keeps(waiting, book, elsewhere, sharing)


def _keeps(waiting: Waiting, book: Book, elsewhere: Collection[str], sharing: Sharing | None) -> bool:
    """Return True if a worker on which others run is to be kept for a job that must be alone."""
    if not waiting.request.get(ALONE) or waiting.shape in elsewhere or book.allocated.get(ALONE, 0):
        return False
    return _fits_empty(waiting, book, sharing)


def _fits_empty(waiting: Waiting, book: Book, sharing: Sharing | None) -> bool:
    """Return True if a worker would have room for an alternative of a job, were it empty."""
    empty = replace(book, allocated={})
    return any(fits(entry.request, empty) is None for entry in within_quota(waiting, sharing))


def choose_alternative(
    waiting: Waiting, books: Iterable[Book], candidates: int, sharing: Sharing | None = None
) -> tuple[Waiting, Admission | Refusal]:
    """Return the first alternative of a job for which `choose` finds a worker, and the decision.

    An alternative that the quota of its tenant holds back is passed over. Where no worker has room, the decision is
    about the first alternative.
    """
    books = list(books)
    first: tuple[Waiting, Admission | Refusal] = (waiting, Refusal(Reason.TENANT_QUOTA))
    for entry in reversed([*within_quota(waiting, sharing)]):
        decision = choose(
            entry.request, books, candidates, task=entry.task, bound=entry.run_time.bound, terms=entry.terms
        )
        if isinstance(decision, Admission) or not isinstance(first[1], Admission):
            first = entry, decision
    return first
