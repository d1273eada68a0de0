"""Missing room: what each worker lacks for a request, and which running jobs would make room by their end.

Plain functions of plain values, for `explain`. They decide nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from celery_capacity.routing.model.amounts import ALONE, CPUS, is_label
from celery_capacity.routing.model.request import Request
from celery_capacity.routing.policy.feasibility import is_large_enough, likeness
from celery_capacity.routing.policy.placement import Book, fits, shortages

#: Sets of running jobs that are tried on one worker for the smallest one. Beyond them a good set is taken, not the
#: smallest. Jobs with equal requests are tried once, so a usual worker needs fewer.
MAX_SETS: Final = 2000


@dataclass(frozen=True, slots=True)
class Room:
    """Room for one resource of a request on a worker: millicores, bytes or pieces. `free` < 0: the worker is over."""

    resource: str
    asked: int
    free: int
    total: int

    @property
    def enough(self) -> bool:
        return self.free >= self.asked


@dataclass(frozen=True, slots=True)
class Missing:
    """Shortage of a worker for a request. `rooms`: a line for each resource of the request.

    Not `admits`: the worker takes no job now, whatever room it has. `alone`: it is left to a job that must run alone,
    or the job must run alone and others run there.
    """

    worker: str
    admits: bool
    rooms: tuple[Room, ...]
    alone: bool = False


@dataclass(frozen=True, slots=True)
class Running:
    """A job that holds room on a worker. `since`: the time of its admission or start, in any unit."""

    job: str
    request: Request
    since: float


@dataclass(frozen=True, slots=True)
class Unblocking:
    """Running jobs on one worker whose ends make room, the oldest first."""

    worker: str
    jobs: tuple[str, ...]


def missing_on_each(
    request: Request, books: Iterable[Book], task: str = "", bound: int = 0, terms: str = ""
) -> list[Missing]:
    """Return what each worker that may take the request lacks, the closest worker first.

    Workers that do not know the task, do not serve the queue, end within the `bound` of the job (ms), or that its
    `terms` do not allow, are left out.
    The closest worker admits jobs, lacks the fewest resources, then has the most free CPUs, then comes first by name.
    """
    knowing = [book for book in books if book.knows(task) and book.serves(request)]
    possible = [book for book in knowing if book.lasts(bound) and book.allows(terms)]
    # Books of a large cluster are often alike, and each of these lacks as much.
    kinds = {book.worker: likeness(book) for book in possible}
    distinct = {kinds[book.worker]: book for book in possible}
    short = {kind: shortages(request, book) for kind, book in distinct.items()}
    rooms = {kind: _rooms(request, book) for kind, book in distinct.items()}
    alone = {kind for kind, lacks in short.items() if any(lack.resource == ALONE for lack in lacks)}
    possible.sort(key=lambda book: (not book.admitting, len(short[kinds[book.worker]]), -book.free(CPUS), book.worker))
    return [
        Missing(book.worker, book.admitting, rooms[kinds[book.worker]], kinds[book.worker] in alone)
        for book in possible
    ]


def _rooms(request: Request, book: Book) -> tuple[Room, ...]:
    return tuple(
        Room(name, amount, book.free(name), book.capacity.get(name, 0))
        for name, amount in request.amounts
        if name != ALONE and not is_label(name)
    )


def unblocked_by(
    request: Request,
    books: Iterable[Book],
    running: Mapping[str, Sequence[Running]],
    task: str = "",
    bound: int = 0,
    terms: str = "",
) -> Unblocking | None:
    """Return the smallest set of running jobs on one worker whose ends make room; None where no such set is known.

    `running`: the jobs of each worker that is to be looked at. `bound`: milliseconds after which the job has ended, 0
    for unknown. A worker that ends before, or that the `terms` do not allow, is left out. Of equally small sets the one
    whose jobs are the oldest is taken, then the worker that comes first by name.
    """
    best: tuple[int, list[float], str, tuple[str, ...]] | None = None
    for book in sorted((book for book in books if book.worker in running), key=lambda book: book.worker):
        jobs = running[book.worker]
        takes = book.admitting and book.knows(task) and book.lasts(bound) and book.allows(terms)
        if not jobs or not takes or not is_large_enough(request, book):
            continue
        chosen = _smallest(request, book, jobs)
        if chosen:
            chosen.sort(key=lambda job: (job.since, job.job))
            candidate = (len(chosen), [job.since for job in chosen], book.worker, tuple(job.job for job in chosen))
            best = candidate if best is None else min(best, candidate)
    return None if best is None else Unblocking(best[2], best[3])


def _smallest(request: Request, book: Book, jobs: Sequence[Running]) -> list[Running]:
    """Return the smallest set of these jobs whose ends make room, the oldest one of equal sizes; [] for none."""
    if not _makes_room(request, book, jobs):
        return []
    groups = _by_request(jobs)
    tried = 0
    for size in range(1, len(jobs) + 1):
        fitting = []
        for chosen in _sets(groups, size):
            tried += 1
            if tried > MAX_SETS:
                return _good_set(request, book, jobs)
            if _makes_room(request, book, chosen):
                fitting.append(sorted(chosen, key=lambda job: (job.since, job.job)))
        if fitting:
            return min(fitting, key=lambda chosen: [(job.since, job.job) for job in chosen])
    return []


def _by_request(jobs: Sequence[Running]) -> list[list[Running]]:
    """Return the jobs of each request, the oldest first."""
    groups: dict[Request, list[Running]] = defaultdict(list)
    for job in sorted(jobs, key=lambda job: (job.since, job.job)):
        groups[job.request].append(job)
    return list(groups.values())


def _sets(groups: Sequence[Sequence[Running]], size: int) -> Iterator[list[Running]]:
    """Yield the sets of `size` jobs, of each request the oldest ones."""
    if size == 0:
        yield []
        return
    for number, group in enumerate(groups, 1):
        for count in range(1, min(size, len(group)) + 1):
            for rest in _sets(groups[number:], size - count):
                yield [*group[:count], *rest]


def _good_set(request: Request, book: Book, jobs: Sequence[Running]) -> list[Running]:
    """Return a set that makes room: the jobs that give the most, the oldest of equal ones; none of them is needless."""
    chosen: list[Running] = []
    left, after = list(jobs), book
    while fits(request, after) is not None:
        short = {shortage.resource: shortage.asked - shortage.free for shortage in shortages(request, after)}

        def key(job: Running, short: Mapping[str, int] = short) -> tuple[float, float, str]:
            gives = sum(min(job.request.get(name), lack) / lack for name, lack in short.items() if lack > 0)
            return (-gives, job.since, job.job)

        job = min(left, key=key)
        left.remove(job)
        chosen.append(job)
        after = after.without(job.request)
    for job in sorted(chosen, key=lambda job: (-job.since, job.job)):
        rest = [other for other in chosen if other is not job]
        if rest and _makes_room(request, book, rest):
            chosen = rest
    return chosen


def _makes_room(request: Request, book: Book, ended: Sequence[Running]) -> bool:
    for job in ended:
        book = book.without(job.request)
    return fits(request, book) is None
