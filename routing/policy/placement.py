"""Placement of jobs on workers: the specification, as plain functions of plain values.

No clock, no randomness, no log, no I/O. Property tests hold the Lua scripts to these functions; `explain` and what-if
questions call them as they are. A refusal is a value with a reason; its words are made where it is shown.

The rules:

- A worker takes a job if it has room for the whole request. It has none of a resource that it does not publish.
- A worker whose allocations exceed its capacity in any resource (the capacity shrank) takes nothing until it fits
  again, not even a job that asks for nothing. It is passed over like a cordoned worker.
- A job runs a task, and only workers that have registered the task take the job. Tasks that come with Celery and with
  the platform are known to all. A worker of an older release, which published none, takes any.
- A job may ask for labels of its worker, or for one worker by its name, and for the worker alone (`labels`).
- A worker may end at a known time. It takes a job only if the job's bound is over by then: its hard time limit, or
  without one its expected run time. A job with neither is taken.
- A job is in a queue, and only workers that serve the queue take the job. A queue other than the default one is a
  label: the job asks for one of it, and workers that serve the queue have more than can be allocated. A worker that
  does not serve the default queue takes only jobs with a label. Labels are no capacity: a worker that serves a queue no
  more is not over its capacity for the jobs that it still holds of that queue.
- A job may have alternatives, in order. It takes the first one for which any worker has room. A worker that fills its
  room takes a waiting job by the first one that fits there.
- Best fit: of the workers with room, the one with the fewest free CPUs, ties by name. A spread job goes to the last.
- Waiting jobs come in order of priority (9 first) and then of submission. A job that does not fit holds up no other,
  unless a worker is reserved for it (`reservation`).
- The last attempt of a job (one more loss ends the job) runs alone on its worker, so that it can break only itself. It
  asks for `alone`, of which every worker has one. It fits where nothing is allocated, and beside it nothing fits. It
  must not wait for ever while others come: when its turn comes, a worker that it would fit, were it empty, is *kept*
  for its shape, and takes nothing else until it is empty. Only one worker is kept for a shape at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from celery_capacity.routing.model.amounts import (
    ALONE,
    CPUS,
    DEFAULT_QUEUE,
    LABEL,
    MEMORY,
    ONLY_LABELLED,
    SLOTS,
    has_index,
    is_label,
)
from celery_capacity.routing.model.expected import UNKNOWN, RunTime
from celery_capacity.routing.model.reasons import Reason
from celery_capacity.routing.model.request import (
    Request,
    alternatives_of,
    filed_shape,
    holding,
    split_shape,
    split_suffix,
    timed,
)
from celery_capacity.routing.policy.amount_classes import CLASS_SPAN, amount_class
from celery_capacity.routing.policy.labels import allows, is_exclusive, is_spread, named_worker

#: highest priority; the lowest is 0, and a higher one comes first
TOP_PRIORITY = 9
#: submissions that fit between two priorities. Ten times as many stay below 2^53, up to which Redis's scores are exact.
SUBMISSIONS = 2**49

#: Name of the time that a worker has left, in a refusal.
TIME = "time"
#: Workers that one script looks at. A book takes some 5 us to read, so Redis is held for well under a millisecond.
CANDIDATES = 64
#: Shapes that one script looks at, for the same reason; platforms have tens of shapes rather than thousands.
SHAPES = 64
#: Jobs that one script admits: a few calls fill an empty worker with 96 CPUs.
MAX_ADMITTED = 32


class Shortage(NamedTuple):
    """Resource of which a worker has too little: millicores, bytes or pieces. `free` < 0: the worker is over."""

    resource: str
    asked: int
    free: int


@dataclass(frozen=True)
class Admission:
    """Decision that the job goes to this worker."""

    worker: str


@dataclass(frozen=True)
class Refusal:
    """Decision that the job goes nowhere now. `resource`, `asked`, `free` and `worker` say what is short where.

    They describe the worker that comes closest; "" and 0 where there is none. For `TOO_LARGE` `free` is its capacity.
    For `NO_TIME` `asked` is the bound of the job, and `free` the rest of the worker's life, in milliseconds. For
    `BEHIND_SHAPE` `asked` is the number of jobs before it. For `LOOK_FURTHER` (`free`, `worker`) is the cursor. For
    `ALONE` `worker` is the worker that is kept for the job, "" where none is yet. For `RESERVED` `worker` has room, and
    `free` is the time (ms) at which an earlier job is to start there, 0 where the worker is kept until it does.
    """

    reason: Reason
    resource: str = ""
    asked: int = 0
    free: int = 0
    worker: str = ""


@dataclass(frozen=True)
class Book:
    """Capacity and allocations of a worker, by resource.

    Not `admitting`: the worker is cordoned, draining or closed. `kept`: the only shape that the worker takes, "" for no
    such limit. `tasks`: those that it has registered, None where it takes any. `left`: milliseconds until it ends, None
    where no end is known. `reserved_at`: where the worker is kept by a reservation, which others may pass, the time of
    that (ms, 0 until the job starts), else None. `labels`: its labels, by key.
    """

    worker: str
    capacity: Mapping[str, int]
    allocated: Mapping[str, int]
    admitting: bool = True
    kept: str = ""
    tasks: Collection[str] | None = None
    left: int | None = None
    reserved_at: int | None = None
    labels: Mapping[str, str] = field(default_factory=dict)

    def free(self, resource: str) -> int:
        """Return capacity less allocations; negative while the worker is over its capacity."""
        return self.capacity.get(resource, 1 if resource == ALONE else 0) - self.allocated.get(resource, 0)

    @property
    def empty(self) -> bool:
        """Return True if nothing is allocated; the slots tell, since every job takes one."""
        return not self.allocated.get(SLOTS, 0)

    @property
    def open(self) -> bool:
        """Return True if a request that does not ask to be alone may come.

        The ledger's index has just these workers.
        """
        left_to_one = self.kept or self.allocated.get(ALONE, 0)
        return self.admitting and not self.over and self.free(SLOTS) >= 1 and not left_to_one

    @property
    def over(self) -> str | None:
        """Return the first resource, by name, in which allocations exceed capacity; None for none."""
        return next(iter(self.exceeded), None)

    @property
    def exceeded(self) -> list[str]:
        """Return all resources in which allocations exceed capacity, by name."""
        return [name for name in sorted(self.allocated) if self.free(name) < 0 and not is_label(name)]

    @property
    def index_names(self) -> frozenset[str]:
        """Return the resources in whose indexes the worker stands while it is open.

        These are the resources that it has beside CPUs and slots. A worker that takes only jobs with a label is found
        by its queues alone.
        """
        only = self.capacity.get(ONLY_LABELLED, 0)
        names = (name for name, amount in self.capacity.items() if amount and (has_index(name) or name == MEMORY))
        return frozenset(name for name in names if is_label(name) or not only)

    def index_score(self, name: str) -> int:
        """Return the score in the index of a resource: the free CPUs, and above them the class of its free amount."""
        if is_label(name):
            return self.free(CPUS)
        return amount_class(self.free(name)) * CLASS_SPAN + min(self.free(CPUS), CLASS_SPAN - 1)

    def serves(self, request: Request) -> bool:
        """Return True if the worker takes jobs of this request's queue."""
        if request.queue == DEFAULT_QUEUE:
            return not self.capacity.get(ONLY_LABELLED, 0)
        return self.capacity.get(LABEL + request.queue, 0) > 0

    def knows(self, task: str) -> bool:
        """Return True if the worker takes jobs of this task; "" is a task that every worker knows."""
        return self.tasks is None or filed_shape("", task) == "" or task in self.tasks

    def lasts(self, bound: int) -> bool:
        """Return True if a job that ends within `bound` milliseconds, 0 for unknown, ends before the worker does."""
        return self.left is None or bound <= self.left

    def allows(self, terms: str) -> bool:
        """Return True if jobs with these terms may run on a worker with this name and these labels."""
        return allows(terms, self.worker, self.labels)

    def takes(self, waiting: Waiting) -> bool:
        """Return True if the worker knows the task of a waiting job, lasts as long as the job, and may run it."""
        return self.knows(waiting.task) and self.lasts(waiting.run_time.bound) and self.allows(waiting.terms)

    def holding(self, request: Request) -> Book:
        """Return the book after this request was admitted."""
        return self._moved(request, 1)

    def without(self, request: Request) -> Book:
        """Return the book after this request was released."""
        return self._moved(request, -1)

    def _moved(self, request: Request, sign: int) -> Book:
        moved = {name: self.allocated.get(name, 0) + sign * amount for name, amount in request.amounts}
        return replace(self, allocated={**self.allocated, **moved})


@dataclass(frozen=True)
class Waiting:
    """A job in the backlog. `order` is the number that `order()` makes of priority and submission.

    `task`: its name; "" for one that every worker knows. `run_time`: its classes, as the job is filed. `terms`: those
    of its shape, as `terms_of` returns them. `request`: the first alternative, or the one that the job takes.
    """

    job: str
    request: Request
    order: int
    task: str = ""
    run_time: RunTime = UNKNOWN
    terms: str = ""

    @property
    def shape(self) -> str:
        """Return the shape under which the job is filed, whichever alternative it takes."""
        return filed_shape(timed(self.alternatives[0].shape + self.terms, self.run_time), self.task)

    @property
    def held_shape(self) -> str:
        """Return the shape of the job while it holds its request."""
        return holding(self.shape, self.alternatives.index(self.request) + 1)

    @property
    def alternatives(self) -> tuple[Request, ...]:
        """Return the requests of which the job needs one, in order."""
        return alternatives_of(self.request.shape + self.terms) if ",|" in self.terms else (self.request,)

    @property
    def choices(self) -> tuple[Waiting, ...]:
        """Return the job with each of its alternatives, in order."""
        return tuple(replace(self, request=it) for it in self.alternatives) if ",|" in self.terms else (self,)


def order(priority: int, seq: int) -> int:
    """Return a number that sorts by priority (9 first), then by submission; `seq` counts submissions from 0."""
    if not 0 <= priority <= TOP_PRIORITY or not 0 <= seq < SUBMISSIONS:
        raise ValueError(f"priority {priority} must be 0 to {TOP_PRIORITY}, seq {seq} 0 to {SUBMISSIONS - 1}")
    return (TOP_PRIORITY - priority) * SUBMISSIONS + seq


def is_last_chance(losses: int, most_losses: int) -> bool:
    """Return True if one more loss ends a job that has lost so many attempts.

    Where the first loss ends a job, every attempt is its last, and none runs alone: return False.
    """
    return most_losses > 1 and losses >= most_losses - 1


def held_by(request: Request, losses: int, most_losses: int) -> Request:
    """Return the request that a job's next attempt holds; at its last chance it also holds the worker alone."""
    if request.get(ALONE) or not is_last_chance(losses, most_losses):
        return request
    return Request.of({**dict(request.amounts), ALONE: 1})


def asked_shape(shape: str) -> str:
    """Return the shape that a job itself asks for, from the shape that it holds or is filed under."""
    asked = dict(Request.from_shape(shape).amounts)
    if not is_exclusive(shape):
        asked.pop(ALONE, 0)
    return Request.of(asked).shape + split_suffix(shape)[1]


def asked_kept(book: Book) -> str:
    """Return the request of the only shape that a kept worker takes, without its task."""
    return split_shape(book.kept)[0]


def shortages(request: Request, book: Book) -> list[Shortage]:
    """Return every resource of which the worker has too little, by name.

    While the worker is over its capacity in any resource, return only the exceeded ones. Where it does not serve the
    request's queue, return only the queue.
    """
    if book.over:
        return [Shortage(name, request.get(name), book.free(name)) for name in book.exceeded]
    if not book.serves(request):
        return [Shortage(LABEL + request.queue, 1, 0)]
    alone = request.get(ALONE)
    left_to_another = book.kept and book.reserved_at is None and asked_kept(book) != request.shape
    if book.allocated.get(ALONE, 0) or left_to_another or (alone and not book.empty):
        return [Shortage(ALONE, alone, 0)]
    return [Shortage(name, amount, book.free(name)) for name, amount in request.amounts if amount > book.free(name)]


def fits(request: Request, book: Book) -> Shortage | None:
    """Return None if the worker has room for the whole request, else its first shortage; ignores `admitting`."""
    short = shortages(request, book)
    return short[0] if short else None


def found_by(request: Request, books: Iterable[Book]) -> str:
    """Return the index in which a request's candidates stand.

    For a labelled queue that is the index of the queue. In the default queue it is the index of a requested resource
    beside CPUs and slots: of the resource of which the fewest open workers may have enough, by the classes of their
    free amounts, and of equal ones the first by name. "" means all workers that serve the default queue.
    """
    if request.queue != DEFAULT_QUEUE:
        return LABEL + request.queue
    named = sorted(name for name, _ in request.amounts if has_index(name) or name == MEMORY)
    standing = [book for book in books if book.open] if named else []
    return min(named, key=lambda name: sum(_may_have(name, request, book) for book in standing), default="")


def _may_have(index_name: str, request: Request, book: Book) -> bool:
    """Return True if a worker's place in an index says that it may have what a request asks for."""
    if index_name not in book.index_names:
        return False
    return is_label(index_name) or amount_class(book.free(index_name)) >= amount_class(request.get(index_name))


def choose(
    request: Request,
    books: Iterable[Book],
    candidates: int,
    after: tuple[int, str] | None = None,
    task: str = "",
    bound: int = 0,
    terms: str = "",
) -> Admission | Refusal:
    """Return the best fit among at most `candidates` workers, as one script looks at them.

    The candidates admit, are not over their capacity, and have a free slot and enough free CPUs. A worker on which a
    job is alone, or that is kept for a job, is no candidate. All of them stand in the index that the request is
    `found_by`. They come in order of (free CPUs, name), behind the cursor `after` where there is one. The first with
    room for the whole request that knows the task, lasts for the job's `bound` (ms), and that its `terms` allow, is
    chosen. Of a job that names a worker only that one is a candidate. A job that is spread looks from the other end.
    """
    books = list(books)
    admitting = [book for book in books if book.admitting]
    if not admitting:
        return Refusal(Reason.NO_WORKER)
    index_name, name, spread = found_by(request, books), named_worker(terms), is_spread(terms)
    index = sorted(
        (
            (book.free(CPUS), book.worker, book)
            for book in (book for book in admitting if book.open and name in ("", book.worker))
            if (_may_have(index_name, request, book) if index_name else book.serves(request))
        ),
        key=lambda row: row[:2],
        reverse=spread,
    )
    asked = request.get(CPUS)
    behind = [row for row in index if row[0] >= asked]
    behind = [row for row in behind if after is None or name or (row[:2] < after if spread else row[:2] > after)]
    looked_at = behind[:candidates]
    for _, worker, book in looked_at:
        if fits(request, book) is None and book.knows(task) and book.lasts(bound) and book.allows(terms):
            return Admission(worker)
    if len(behind) > len(looked_at):
        free, worker, _ = looked_at[-1]
        return Refusal(Reason.LOOK_FURTHER, CPUS, asked, free, worker)
    return closest_refusal(
        request, [book for book in admitting if book.knows(task) and book.allows(terms)], Reason.NO_ROOM
    )


def closest_refusal(request: Request, books: Sequence[Book], reason: Reason) -> Refusal:
    """Return the refusal of the worker that lacks the fewest resources, then has most free CPUs, then by name."""
    judged = [(shortages(request, book), book) for book in books]
    closest = min(
        ((short, book) for short, book in judged if short),
        key=lambda pair: (len(pair[0]), -pair[1].free(CPUS), pair[1].worker),
        default=None,  # all have room: they stand before a cursor, and the caller has seen them already
    )
    return Refusal(reason, *closest[0][0], worker=closest[1].worker) if closest else Refusal(reason)
