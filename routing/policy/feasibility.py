"""Feasibility of requests: tell if any registered worker could ever take a job, and how many would start before it.

Plain functions of plain values, as in `routing.policy.placement`. A registered worker counts whatever it admits now:
cordoned, draining or silent workers are registered until they leave or are lost.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from celery_capacity.routing.model.amounts import ALONE, CPUS, format_amount, is_label
from celery_capacity.routing.model.reasons import Reason
from celery_capacity.routing.model.request import Request, alternatives_of, run_time_of, split_shape, terms_of
from celery_capacity.routing.policy.labels import named_worker, place_of, words_of_labels
from celery_capacity.routing.policy.placement import (
    TIME,
    Admission,
    Book,
    Refusal,
    asked_kept,
    choose,
    closest_refusal,
    fits,
    shortages,
)


@dataclass(frozen=True, slots=True)
class Shortfall:
    """The resource for which no registered worker could hold a request: millicores, bytes or pieces.

    `largest`: the capacity of `worker`, "" and 0 where no worker publishes the resource. `combined`: some workers have
    enough of each resource, and none has enough of all; then `worker` is the one that comes closest. Where the reason
    is `NO_LABEL`, `resource` is the place that is asked for, and `labels` those of the workers, in words.
    """

    reason: Reason
    resource: str
    asked: int
    largest: int = 0
    worker: str = ""
    combined: bool = False
    labels: str = ""

    def __str__(self) -> str:
        """Return the shortfall in words: "asks for 128 CPUs; the largest registered worker has 96 CPUs (worker-07)"."""
        if self.reason is Reason.NO_LABEL:
            has = f"; the registered workers have {self.labels}" if self.labels else ""
            return f"asks for {self.resource}, and no registered worker is such a one{has}"
        asked = f"asks for {format_amount(self.resource, self.asked)}"
        if not self.worker:
            return f"{asked}; no registered worker publishes {self.resource}"
        which = "registered worker that comes closest" if self.combined else "largest registered worker"
        beside = " beside the rest of its request" if self.combined else ""
        return f"{asked}{beside}; the {which} has {format_amount(self.resource, self.largest)} ({self.worker})"


def is_large_enough(request: Request, book: Book) -> bool:
    """Return True if a worker serves the request's queue and would have room for the request if it were empty."""
    return fits(request, replace(book, allocated={}, kept="")) is None


def find_shortfall(request: Request, registered: Iterable[Book], terms: str = "") -> Shortfall | None:
    """Return the reason why no registered worker could ever hold a request with these terms, None where one could.

    Without a worker that serves the request's queue nothing is judged: return None. Of alternatives none may fit, and
    the reason is that of the first one.
    """
    books, first = list(registered), None
    for alternative in alternatives_of(request.shape + terms):
        shortfall = _shortfall(alternative, books, terms)
        if shortfall is None:
            return None
        first = first or shortfall
    return first


def _shortfall(request: Request, registered: Iterable[Book], terms: str) -> Shortfall | None:
    every = [replace(book, allocated={}, kept="") for book in registered if book.serves(request)]
    serving = [book for book in every if book.allows(terms)]
    if every and not serving:
        labels = words_of_labels([book.labels for book in every], terms)
        return Shortfall(Reason.NO_LABEL, str(place_of(terms)), 0, labels=labels)
    if not serving or any(fits(request, book) is None for book in serving):
        return None
    amounts = [(name, amount) for name, amount in request.amounts if name != ALONE and not is_label(name)]
    largest = {name: min(serving, key=lambda book: (-book.capacity.get(name, 0), book.worker)) for name, _ in amounts}
    for name, amount in amounts:
        if not largest[name].capacity.get(name, 0):
            return Shortfall(Reason.UNKNOWN_RESOURCE, name, amount)
    for name, amount in amounts:
        if (most := largest[name].capacity[name]) < amount:
            return Shortfall(Reason.TOO_LARGE, name, amount, most, largest[name].worker)
    short, closest = min(
        ((shortages(request, book), book) for book in serving),
        key=lambda pair: (len(pair[0]), -pair[1].free(CPUS), pair[1].worker),
    )
    return Shortfall(Reason.TOO_LARGE, *short[0], worker=closest.worker, combined=True)


def survey(
    request: Request, books: Iterable[Book], ahead: int = 0, task: str = "", bound: int = 0, terms: str = ""
) -> Admission | Refusal:
    """Return the decision over all workers, with the best reason there is, as `explain` says it.

    `ahead`: jobs of the same request and task that wait before this one; they would get the room first. `bound`:
    milliseconds after which the job has ended, 0 for unknown.
    """
    live = list(books)
    knowing = [book for book in live if book.knows(task)]
    if live and not knowing:
        return Refusal(Reason.NO_TASK)
    serving = [book for book in knowing if book.serves(request)]
    if knowing and not serving:
        return Refusal(Reason.NO_QUEUE)
    allowed = [book for book in serving if book.allows(terms)]
    if serving and not allowed:
        return Refusal(Reason.NO_LABEL)
    admitting = [book for book in allowed if book.admitting]
    if not admitting:
        return Refusal(Reason.NO_WORKER)
    for name, amount in request.amounts:
        if name != ALONE and not any(book.capacity.get(name, 0) for book in allowed):
            return Refusal(Reason.UNKNOWN_RESOURCE, name, amount)
    empty = [replace(book, allocated={}, kept="") for book in admitting]
    large_enough = [book for book, bare in zip(admitting, empty, strict=True) if fits(request, bare) is None]
    if not large_enough:
        return closest_refusal(request, empty, Reason.TOO_LARGE)
    lasting = [book for book in large_enough if book.lasts(bound)]
    if not lasting:
        longest = max(large_enough, key=lambda book: (book.left or 0, book.worker))
        return Refusal(Reason.NO_TIME, TIME, bound, longest.left or 0, longest.worker)
    decision = choose(request, lasting, len(lasting), terms=terms)
    if isinstance(decision, Admission) and ahead:
        return Refusal(Reason.BEHIND_SHAPE, asked=ahead, worker=decision.worker)
    if isinstance(decision, Refusal) and request.get(ALONE):
        kept = next((book.worker for book in lasting if asked_kept(book) == request.shape), "")
        return Refusal(Reason.ALONE, worker=kept)
    if isinstance(decision, Refusal) and decision.reason is Reason.NO_ROOM:
        passed = (book for book in lasting if book.reserved_at is not None and fits(request, book) is None)
        if (book := min(passed, key=lambda book: book.worker, default=None)) is not None:
            return Refusal(Reason.RESERVED, free=book.reserved_at or 0, worker=book.worker)
    return decision


def judge(
    request: Request,
    registered: Iterable[Book],
    ahead: int = 0,
    task: str = "",
    bound: int = 0,
    terms: str = "",
    passed_over: Collection[Request] = (),
) -> Admission | Refusal:
    """Return the decision over all registered workers, with the best reason there is.

    `ahead`: jobs of the same request and task that wait before this one. `bound`: milliseconds after which the job has
    ended, 0 for unknown. A request that no worker could ever hold is refused as such, also while no worker admits
    anything. Where only workers that admit nothing now are large enough, the refusal is `NO_WORKER` and names the first
    of them. Of alternatives the first one with a worker counts, then the first one that a worker could ever hold.
    `passed_over`: alternatives that a quota holds back. They do not count, unless all of them are.
    """
    books = without_doubles(registered, named_worker(terms))
    every = alternatives_of(request.shape + terms)
    requests = [alternative for alternative in every if alternative not in passed_over] or every
    decisions = [_judge(alternative, books, ahead, task, bound, terms) for alternative in requests]
    return min(decisions, key=_hopelessness)


def _hopelessness(decision: Admission | Refusal) -> int:
    """Return 0 for a decision that finds a worker, 2 for a request that no worker could ever hold, else 1."""
    if isinstance(decision, Admission) or decision.reason is Reason.BEHIND_SHAPE:
        return 0
    return 2 if decision.reason in (Reason.TOO_LARGE, Reason.UNKNOWN_RESOURCE) else 1


def _judge(
    request: Request, books: Sequence[Book], ahead: int, task: str, bound: int, terms: str
) -> Admission | Refusal:
    """Return the decision for one request."""
    knowing = [book for book in books if book.knows(task)]
    kinds = with_named(kinds_of(knowing), knowing, terms)
    never = _shortfall(request, kinds, terms)
    if never is not None:
        return Refusal(never.reason, never.resource, never.asked, never.largest, never.worker)
    large = [book for book in kinds if book.allows(terms) and is_large_enough(request, book)]
    if large and not any(book.admitting for book in large):
        return Refusal(Reason.NO_WORKER, worker=min(book.worker for book in large))
    return survey(request, books, ahead, task, bound, terms)


def likeness(book: Book) -> Hashable:
    """Return all that a book says but for its worker's name. The name belongs to it where the worker is kept."""
    tasks = None if book.tasks is None else frozenset(book.tasks)
    kept = book.kept and (book.kept, book.worker, book.reserved_at)
    amounts = tuple(book.capacity.items()), tuple(book.allocated.items())
    return amounts, book.admitting, kept, tasks, book.left, tuple(book.labels.items())


def without_doubles(books: Iterable[Book], name: str = "") -> list[Book]:
    """Return of books that are alike only the first and the last by name, and the book of the worker `name`.

    A decision over all of them is the same: a worker is chosen by its amounts, and of equal ones by its name.
    """
    books = list(books)
    firsts: dict[Hashable, str] = {}
    lasts: dict[Hashable, str] = {}
    for book in books:
        alike, worker = likeness(book), book.worker
        if worker < firsts.get(alike, "\U0010ffff"):
            firsts[alike] = worker
        if worker > lasts.get(alike, ""):
            lasts[alike] = worker
    chosen = {name, *firsts.values(), *lasts.values()}
    return [book for book in books if book.worker in chosen]


def kind_of(book: Book) -> Hashable:
    """Return the kind of a worker: its capacity, its tasks, its labels, and if it admits jobs."""
    tasks = None if book.tasks is None else frozenset(book.tasks)
    return tuple(book.capacity.items()), book.admitting, tasks, tuple(book.labels.items())


def kinds_of(books: Iterable[Book]) -> list[Book]:
    """Return one worker of each kind, the first by name, as if it were empty.

    Of a large cluster these are few, and each question about empty workers has the same answer for all of a kind.
    """
    kinds: dict[Hashable, Book] = {}
    for book in books:
        kind = kind_of(book)
        first = kinds.get(kind)
        if first is None or book.worker < first.worker:
            kinds[kind] = book
    return [replace(book, allocated={}, kept="") for book in kinds.values()]


def count_before(waiting: Mapping[str, int], registered: Iterable[Book]) -> int:
    """Return how many of the waiting jobs that come before a job would start before it.

    `waiting`: the number of these jobs by the shape under which they are filed. A job that no registered worker could
    ever take, or that outlives each one that could, holds up no other, and does not count.
    """
    startable = startable_shapes((filed for filed, number in waiting.items() if number > 0), registered)
    return sum(waiting[filed] for filed in startable)


def startable_shapes(shapes: Iterable[str], registered: Iterable[Book]) -> set[str]:
    """Return the filed shapes whose jobs some registered worker could ever take, and that it outlives."""
    books = list(registered)
    distinct = {likeness(book): book for book in books}
    # Of each kind the worker that lives longest takes all that others of its kind would take.
    kinds = list({kind_of(book): book for book in sorted(distinct.values(), key=_lifetime)}.values())
    return {filed for filed in shapes if _can_start(filed, kinds, books)}


def _can_start(filed: str, kinds: Sequence[Book], books: Sequence[Book]) -> bool:
    task, terms, requests = split_shape(filed).task, terms_of(filed), alternatives_of(filed)
    possible = (book for book in with_named(kinds, books, terms) if book.allows(terms))
    bound = run_time_of(filed).bound
    lasting = (book for book in possible if book.knows(task) and book.lasts(bound))
    return any(is_large_enough(request, book) for book in lasting for request in requests)


def _lifetime(book: Book) -> float:
    return math.inf if book.left is None else book.left


def with_named(kinds: Sequence[Book], books: Iterable[Book], terms: str) -> Sequence[Book]:
    """Return a book of each kind, and before them the book of the worker that these terms name."""
    name = named_worker(terms)
    return kinds if not name else [*(book for book in books if book.worker == name), *kinds]


def first_possible(filed: str, registered: Sequence[Book]) -> Request:
    """Return the first alternative of a filed shape that a worker could ever hold; else the first one."""
    requests, terms = alternatives_of(filed), terms_of(filed)
    if len(requests) == 1:
        return requests[0]
    kinds = with_named(kinds_of(registered), registered, terms)
    allowed = [book for book in kinds if book.allows(terms)]
    return next((it for it in requests if any(is_large_enough(it, book) for book in allowed)), requests[0])


def large_workers(requests: Sequence[Request], registered: Sequence[Book], task: str, terms: str) -> set[str]:
    """Return the workers that may run the task there, and would have room for an alternative if they were empty."""
    kinds = [book for book in kinds_of(without_doubles(registered)) if book.knows(task)]
    large = {kind_of(book) for book in kinds if any(is_large_enough(request, book) for request in requests)}
    return {book.worker for book in registered if kind_of(book) in large and book.allows(terms)}
