"""The policy alone in virtual time: when and where each job of a trace starts, without a store or a process.

The simulation makes the decisions that the platform makes, at the same moments, and none takes time. A submission looks
for a worker, unless jobs of its shape wait already. An end fills the worker where it happened. Then the reservations
are made anew, and workers that are free for others again are filled. Times are milliseconds.

A simulation begins with empty workers, or with a copy of a cluster: the jobs that run there and those that wait.

With shares of tenants, their turns come before the order of submission, and quotas hold. Where an end gives a tenant
room below its quota, its jobs start on any worker at once. The platform finds those on other workers by its next duty.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from celery_capacity.routing.model.amounts import CPUS
from celery_capacity.routing.model.expected import RunTime, expected_class
from celery_capacity.routing.model.request import Request
from celery_capacity.routing.policy.fill import choose_alternative
from celery_capacity.routing.policy.placement import CANDIDATES, Admission, Book, Waiting, choose, order
from celery_capacity.routing.policy.reservation import (
    Held,
    Patience,
    Reservation,
    Rules,
    after_start,
    earliest_start,
    first_fitting,
    large_enough,
    passes,
    place_in_line,
    renew,
)
from celery_capacity.routing.policy.tenants import Sharing, tenant_of, within_quota
from celery_capacity.routing.simulation.expectations import Expectations
from celery_capacity.routing.simulation.jobs import Queued, Running, Start, Submission
from celery_capacity.routing.simulation.shares import Shares, Turns

#: Kinds of events, in the order in which those of one time happen.
_END, _SUBMIT, _LOOK = 0, 1, 2


@dataclass
class Simulation:
    """The state of a simulated cluster, and its events."""

    books: dict[str, Book]
    rules: Rules
    expectations: Expectations
    now: int = 0
    #: Shares of tenants, None where tenants are not in use. Use is counted from the jobs that run at the beginning.
    shares: Shares | None = None
    starts: list[Start] = field(default_factory=list)
    #: Times at which a reserved start was over before the job started.
    overruns: int = 0
    #: Workers that were kept for a job.
    keepings: int = 0
    reservations: dict[str, Reservation] = field(default_factory=dict)
    held: dict[str, dict[str, Held]] = field(default_factory=dict)
    _submissions: dict[str, Submission] = field(default_factory=dict)
    _queues: dict[str, list[tuple[int, str, Waiting]]] = field(default_factory=dict)
    _events: list[tuple[int, int, int, str, str]] = field(default_factory=list)
    patience: Patience = field(default_factory=Patience)
    _looks: set[int] = field(default_factory=set)
    #: Times at which workers end, of those whose end is known.
    _worker_ends: dict[str, int] = field(default_factory=dict)
    #: Memory of `_soonest`, which holds while no job starts or ends on a worker, and none overruns.
    _changes: Counter[str] = field(default_factory=Counter)
    _able: dict[tuple[str, Request], list[str]] = field(default_factory=dict)
    _room_at: dict[tuple[str, Request], dict[str, tuple[int, int, int, int]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._worker_ends = {name: self.now + book.left for name, book in self.books.items() if book.left is not None}

    def run(self, submissions: Iterable[Submission]) -> None:
        """Run until all jobs that can start have ended."""
        ordered = sorted(submissions, key=lambda submission: submission.at)
        self._events = [(entry.at, _SUBMIT, seq, entry.job, "") for seq, entry in enumerate(ordered)]
        self._submissions = {entry.job: entry for entry in ordered}
        self.advance()

    def begin(self, running: Iterable[Running], backlog: Iterable[Queued]) -> None:
        """Begin with these jobs. The books have the running ones allocated. The backlog comes in order, all at once."""
        for job, worker, held, ends, terms in running:
            run = ends - held.admitted
            self._submissions[job] = Submission(job, held.admitted, run, held.request, terms=terms)
            self.held.setdefault(worker, {})[job] = held
            if self.shares is not None:
                self.shares.start(terms, held.request)
            if ends:
                heapq.heappush(self._events, (ends, _END, 0, job, worker))
        for waiting, run in backlog:
            entry = Submission(waiting.job, self.now, run, waiting.request, waiting.task, terms=waiting.terms)
            self._submissions[waiting.job] = entry
            if self.shares is None:
                self._arrive(waiting)
            else:
                heapq.heappush(self._queues.setdefault(waiting.shape, []), (waiting.order, waiting.job, waiting))
        if self.shares is not None:
            # Turns need all waiting jobs at once.
            self._fill_room()
            self._reserve_anew()

    def advance(self, until: str = "") -> None:
        """Go on until a job has started, or until all jobs that can start have ended."""
        seen = 0
        while self._events:
            if until and any(start.job == until for start in self.starts[seen:]):
                return
            seen = len(self.starts)
            self.now, kind, seq, job, worker = heapq.heappop(self._events)
            if kind == _SUBMIT:
                self._submit(seq, self._submissions[job])
            elif kind == _END:
                self._end(job, worker)
            else:
                self._look()

    def backlog(self) -> Iterator[Waiting]:
        """Yield the waiting jobs, in no order."""
        return (waiting for queue in self._queues.values() for _, _, waiting in queue)

    def _submit(self, seq: int, entry: Submission) -> None:
        expected = expected_class(self.expectations.expected(entry))
        run_time, position = RunTime(expected, expected), order(entry.priority, seq)
        self._arrive(Waiting(entry.job, entry.request, position, entry.task, run_time, entry.terms))

    def _arrive(self, waiting: Waiting) -> None:
        """Start a new job where it finds room, else let it wait."""
        queue = self._queues.setdefault(shape := waiting.shape, [])
        # Where a job of the shape waits, a later one finds no room either.
        behind = bool(queue) and queue[0][0] < waiting.order
        starting, worker = (waiting, "") if behind or not self._may_start(waiting) else self._place(waiting)
        if worker:
            self._start(starting, worker)
        else:
            heapq.heappush(queue, (waiting.order, waiting.job, waiting))
        if not queue:
            del self._queues[shape]
        # A job behind one of its shape changes no head.
        if self._queues and not behind:
            self._reserve_anew()

    def _may_start(self, waiting: Waiting) -> bool:
        """Return True if no quota holds a job back."""
        return self.shares is None or self.shares.may_start(waiting)

    @property
    def _sharing(self) -> Sharing | None:
        """Return the shares of now, None where tenants are not in use."""
        if self.shares is None:
            return None
        self.shares.age(self.now)
        return self.shares.sharing

    def _place(self, waiting: Waiting) -> tuple[Waiting, str]:
        """Return a new job as it starts, and its worker: the best fit without a reservation, else where it passes."""
        unreserved = [self._book(name) for name in self.books if name not in self.reservations]
        sharing = self._sharing
        starting, decision = choose_alternative(waiting, unreserved, max(len(unreserved), CANDIDATES), sharing)
        if isinstance(decision, Admission):
            return starting, decision.worker
        entries, bound = self.reservations.items(), waiting.run_time.bound
        for starting in within_quota(waiting, sharing):
            reserved = [self._book(name) for name, entry in entries if passes(starting, entry, self.now, sharing)]
            most = max(len(reserved), CANDIDATES)
            decision = choose(starting.request, reserved, most, task=waiting.task, bound=bound, terms=waiting.terms)
            if isinstance(decision, Admission):
                return starting, decision.worker
        return waiting, ""

    def _book(self, worker: str) -> Book:
        """Return the book of a worker, with the rest of its life."""
        book, ends = self.books[worker], self._worker_ends.get(worker)
        return book if ends is None else replace(book, left=ends - self.now)

    def _end(self, job: str, worker: str) -> None:
        entry = self._submissions[job]
        held = self.held[worker].pop(job)
        self.books[worker] = self.books[worker].without(held.request)
        self._changes[worker] += 1
        self.expectations.learn(entry)
        if self.shares is not None:
            self.shares.end(entry.terms, held.request, self.now - held.admitted)
        self._fill(worker)
        if self.shares is not None and self.shares.has_quota(entry.terms):
            self._fill_room(tenant_of(entry.terms))
        self._reserve_anew()

    def _fill_room(self, tenant: str = "") -> None:
        """Fill the workers that have room for waiting jobs, of all tenants or of one.

        An end that gives a tenant room below its quota may let a job start on another worker.
        """
        while True:
            running = len(self.starts)
            for waiting in sorted((queue[0][2] for queue in self._queues.values()), key=lambda first: first.order):
                waits = waiting.shape in self._queues and tenant in ("", tenant_of(waiting.terms))
                if waits and self._may_start(waiting) and (worker := self._place(waiting)[1]):
                    self._fill(worker)
            if len(self.starts) == running:
                return

    def _look(self) -> None:
        """Make reservations anew at a time that was noted: one is over, or a job has been blocked for long."""
        self._looks.discard(self.now)
        self._reserve_anew()

    def _start(self, waiting: Waiting, worker: str) -> None:
        entry = self._submissions[waiting.job]
        self.books[worker] = self.books[worker].holding(waiting.request)
        self._changes[worker] += 1
        if self.shares is not None:
            self.shares.start(waiting.terms, waiting.request)
        self.held.setdefault(worker, {})[waiting.job] = Held(waiting.request, self.now, waiting.run_time.expected)
        left = after_start(waiting, self.reservations.pop(worker, None), self.now)
        if left is not None:
            self.reservations[worker] = left
        end = self.now + entry.run if entry.run else 0
        self.starts.append(Start(entry.job, entry.at, self.now, end, worker))
        if end:
            heapq.heappush(self._events, (end, _END, 0, entry.job, worker))

    def _fill(self, worker: str) -> None:
        """Start the waiting jobs that fit on a worker, in order, as `fill_or_keep` does."""
        if self.shares is not None:
            self._fill_by_turns(worker, self.shares)
            return
        book = self.books[worker]
        free = book.free(CPUS)
        tries = [
            (queue[0][:2], shape)
            for shape, queue in self._queues.items()
            if any(request.get(CPUS) <= free for request in queue[0][2].alternatives)
        ]
        heapq.heapify(tries)
        while tries:
            _, shape = heapq.heappop(tries)
            queue = self._queues[shape]
            waiting = queue[0][2]
            book = self._book(worker)
            starting = first_fitting(waiting, book, self.reservations.get(worker), self.now)
            if starting is not None and book.open and book.takes(waiting):
                self._leave(shape)
                self._start(starting, worker)
                if queue:
                    heapq.heappush(tries, (queue[0][:2], shape))

    def _fill_by_turns(self, worker: str, shares: Shares) -> None:
        """Start the waiting jobs that fit on a worker, by the turns of their tenants, as `fill_or_keep` does."""
        shares.age(self.now)
        free, behind = self.books[worker].free(CPUS), list[Waiting]()
        firsts = (queue[0][2] for queue in self._queues.values())
        turns = Turns(shares, (first for first in firsts if any(it.get(CPUS) <= free for it in first.alternatives)))
        while (waiting := turns.next()) is not None:
            book, shape = self._book(worker), waiting.shape
            takes = book.open and book.takes(waiting)
            if not takes or first_fitting(waiting, book, sharing=shares.sharing) is None:
                continue
            reservation = self.reservations.get(worker)
            starting = first_fitting(waiting, book, reservation, self.now, shares.sharing)
            if starting is None:
                behind.append(waiting)
                continue
            self._leave(shape)
            self._start(starting, worker)
            if shape in self._queues:
                turns.add(self._queues[shape][0][2])
            left = self.reservations.get(worker)
            if left is None or tenant_of(left.shape) == tenant_of(shape):
                # The reserved job has started, or its tenant's turn comes later: more jobs may pass.
                for other in behind:
                    turns.add(other)
                behind = []

    def _leave(self, shape: str) -> None:
        """Take the first job of a shape out of its queue."""
        heapq.heappop(self._queues[shape])
        if not self._queues[shape]:
            del self._queues[shape]

    def _heads(self) -> list[Waiting]:
        """Return the first jobs of the first blocked shapes, by their places, as many as the depth says."""
        sharing = self._sharing
        firsts = [(place_in_line(shape, queue[0][0], sharing), *queue[0]) for shape, queue in self._queues.items()]
        heapq.heapify(firsts)
        heads: list[Waiting] = []
        while firsts and len(heads) < self.rules.depth:
            waiting = self._planned(heapq.heappop(firsts)[-1])
            if self._may_start(waiting) and any(
                self._outlives(name, self.now, waiting) for name in self._able_workers(waiting)
            ):
                heads.append(waiting)
        return heads

    def _planned(self, waiting: Waiting) -> Waiting:
        """Return a job with the alternative for which a worker is reserved, as `policy.reservation.planned` does."""
        if len(waiting.alternatives) == 1:
            return waiting
        return next((it for it in within_quota(waiting, self._sharing) if self._able_workers(it)), waiting)

    def _reserve_anew(self) -> None:
        """Make the reservations anew until nothing starts by it. Each round fills the workers that gained room."""
        if not self.rules.depth:
            return
        while True:
            before, running = self.reservations, len(self.starts)
            self.reservations = self._reservations(self._heads())
            for worker, earlier in before.items():
                # A job of a tenant whose turn has come may pass a reservation that stays.
                if self.shares is not None or self.reservations.get(worker) != earlier:
                    self._fill(worker)
            if len(self.starts) == running:
                break
        for entry in self.reservations.values():
            self._look_at(entry.at + 1 if entry.at else 0)

    def _reservations(self, heads: Sequence[Waiting]) -> dict[str, Reservation]:
        """Return the reservations of these heads by worker."""
        shapes = [entry.shape for entry in self.reservations.values() if entry.shape in self._queues]
        waiting = [self._planned(self._queues[shape][0][2]) for shape in shapes]
        firsts = {first.shape: first for first in waiting if self._may_start(first)}
        if self.shares is not None:
            # A job that a quota held back is blocked only from now on.
            queues = self._queues.items()
            self.patience.forget({shape for shape, queue in queues if self._may_start(queue[0][2])})
        books = [self._book(name) for name in self._reservable(heads)]
        held = {book.worker: list(self.held.get(book.worker, {}).values()) for book in books}
        renewed = renew(heads, books, held, self.now, self.rules, self.reservations, self.patience, firsts)
        for head in heads:
            self._look_at(self.patience.since(head, self.now) + self.rules.reserve_after)
        self.overruns += renewed.overruns
        self.keepings += renewed.keepings
        return renewed.reservations

    def _reservable(self, heads: Sequence[Waiting]) -> Iterable[str]:
        """Return workers among which `renew` finds the reservations that it would find among all."""
        if any(self.now - self.patience.since(head, self.now) >= self.rules.reserve_after for head in heads):
            return self.books
        names = dict.fromkeys(self.reservations)
        for head in heads:
            # Each earlier head may take one of them.
            names |= dict.fromkeys(name for _, _, name in heapq.nsmallest(len(heads), self._soonest(head)))
        return names

    def _soonest(self, head: Waiting) -> Iterator[tuple[int, int, str]]:
        """Yield the workers where a head can start at a known time, with that time and the free CPUs."""
        room_at = self._room_at.setdefault((head.shape, head.request), {})
        for name in self._able_workers(head):
            changes, until, start, free = room_at.get(name, (-1, 0, 0, 0))
            if self.now >= until or changes != self._changes.get(name, 0):
                start, until = self._start_at(head, name)
                free = self.books[name].free(CPUS)
                room_at[name] = (self._changes[name], until, start, free)
            if start and (name not in self._worker_ends or self._outlives(name, start, head)):
                yield start, free, name

    def _able_workers(self, head: Waiting) -> list[str]:
        """Return the workers that would have room for a job, were they empty, and live long enough at the beginning."""
        able = self._able.get(kind := (head.shape, head.request))
        if able is None:
            books = self.books.values()
            # Each book is judged alone, since `large_enough` looks at some of many.
            able = self._able[kind] = [book.worker for book in books if large_enough(head, [book])]
        return able

    def _outlives(self, worker: str, start: int, waiting: Waiting) -> bool:
        """Return True if a worker lives until a job that starts then has ended."""
        ends = self._worker_ends.get(worker)
        return ends is None or start + waiting.run_time.bound <= ends

    def _start_at(self, head: Waiting, worker: str) -> tuple[int, int]:
        """Return the time of `earliest_start`, and the time from which that has to be asked anew."""
        held = list(self.held.get(worker, {}).values())
        start = earliest_start(head.request, self.books[worker], held, self.now)
        if start == self.now:
            return start, self.now + 1
        return start, min((job.admitted + job.expected for job in held if job.expected), default=self.now + 1)

    def _look_at(self, time: int) -> None:
        if time > self.now and time not in self._looks:
            self._looks.add(time)
            heapq.heappush(self._events, (time, _LOOK, 0, "", ""))


def simulate(
    submissions: Iterable[Submission],
    books: Mapping[str, Book],
    rules: Rules,
    expectations: Expectations,
    shares: Shares | None = None,
) -> Simulation:
    """Return the simulation of these jobs on these workers after its last event."""
    simulation = Simulation(dict(books), rules, expectations, shares=shares)
    simulation.run(submissions)
    return simulation
