"""The policy alone in virtual time: when and where each job of a trace starts, without a store or a process.

The simulation makes the decisions that the platform makes, at the same moments, and none takes time. A submission looks
for a worker, unless jobs of its shape wait already. An end fills the worker where it happened. Then the reservations
are made anew, and workers that are free for others again are filled. Times are milliseconds.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from celery_capacity.routing.model.amounts import CPUS
from celery_capacity.routing.model.expected import RunTime, expected_class
from celery_capacity.routing.model.request import Request
from celery_capacity.routing.policy.placement import CANDIDATES, Admission, Book, Waiting, choose, fits, order
from celery_capacity.routing.policy.reservation import (
    Held,
    Patience,
    Reservation,
    Rules,
    after_start,
    large_enough,
    passes,
    renew,
)

#: Kinds of events, in the order in which those of one time happen.
_END, _SUBMIT, _LOOK = 0, 1, 2


class Submission(NamedTuple):
    """A job of a trace: when it comes, how long it runs, what it asks for. `task` groups jobs with like run times."""

    job: str
    at: int
    run: int
    request: Request
    task: str = ""
    priority: int = 0


class Start(NamedTuple):
    """Start of a job in a simulation."""

    job: str
    submitted: int
    started: int
    ended: int
    worker: str


class Expectations(Protocol):
    """Source of expected run times."""

    def expected(self, submission: Submission) -> int:
        """Return the expected run time in milliseconds at the time of the submission; 0 where it is unknown."""

    def learn(self, submission: Submission) -> None:
        """Take note that a job has ended."""


@dataclass
class Simulation:
    """The state of a simulated cluster, and its events."""

    books: dict[str, Book]
    rules: Rules
    expectations: Expectations
    now: int = 0
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

    def run(self, submissions: Iterable[Submission]) -> None:
        """Run until all jobs that can start have ended."""
        ordered = sorted(submissions, key=lambda submission: submission.at)
        self._events = [(entry.at, _SUBMIT, seq, entry.job, "") for seq, entry in enumerate(ordered)]
        self._submissions = {entry.job: entry for entry in ordered}
        while self._events:
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
        waiting = Waiting(entry.job, entry.request, order(entry.priority, seq), entry.task, RunTime(expected, expected))
        queue = self._queues.get(waiting.shape)
        # Where a job of the shape waits, a later one finds no room either.
        worker = "" if queue and queue[0][0] < waiting.order else self._place(waiting)
        if worker:
            self._start(waiting, worker)
        else:
            heapq.heappush(self._queues.setdefault(waiting.shape, []), (waiting.order, waiting.job, waiting))
        if not worker or self._queues:
            self._reserve_anew()

    def _place(self, waiting: Waiting) -> str:
        """Return the worker for a new job: the best fit without a reservation, else one where the job passes."""
        unreserved = [book for name, book in self.books.items() if name not in self.reservations]
        reserved = [self.books[name] for name, entry in self.reservations.items() if passes(waiting, entry, self.now)]
        for books in (unreserved, reserved):
            decision = choose(waiting.request, books, max(len(books), CANDIDATES), task=waiting.task)
            if isinstance(decision, Admission):
                return decision.worker
        return ""

    def _end(self, job: str, worker: str) -> None:
        entry = self._submissions[job]
        self.books[worker] = self.books[worker].without(self.held[worker].pop(job).request)
        self.expectations.learn(entry)
        self._fill(worker)
        self._reserve_anew()

    def _look(self) -> None:
        """Make reservations anew at a time that was noted: one is over, or a job has been blocked for long."""
        self._looks.discard(self.now)
        self._reserve_anew()

    def _start(self, waiting: Waiting, worker: str) -> None:
        entry = self._submissions[waiting.job]
        self.books[worker] = self.books[worker].holding(waiting.request)
        self.held.setdefault(worker, {})[waiting.job] = Held(waiting.request, self.now, waiting.run_time.expected)
        left = after_start(waiting, self.reservations.pop(worker, None), self.now)
        if left is not None:
            self.reservations[worker] = left
        end = self.now + entry.run
        self.starts.append(Start(entry.job, entry.at, self.now, end, worker))
        heapq.heappush(self._events, (end, _END, 0, entry.job, worker))

    def _fill(self, worker: str) -> None:
        """Start the waiting jobs that fit on a worker, in order, as `fill_or_keep` does."""
        book = self.books[worker]
        free = book.free(CPUS)
        tries = [
            (queue[0][:2], shape) for shape, queue in self._queues.items() if queue[0][2].request.get(CPUS) <= free
        ]
        heapq.heapify(tries)
        while tries:
            _, shape = heapq.heappop(tries)
            queue = self._queues[shape]
            waiting = queue[0][2]
            book = self.books[worker]
            takes = book.open and book.takes(waiting) and fits(waiting.request, book) is None
            if takes and passes(waiting, self.reservations.get(worker), self.now):
                self._leave(shape)
                self._start(waiting, worker)
                if queue:
                    heapq.heappush(tries, (queue[0][:2], shape))

    def _leave(self, shape: str) -> None:
        """Take the first job of a shape out of its queue."""
        heapq.heappop(self._queues[shape])
        if not self._queues[shape]:
            del self._queues[shape]

    def _heads(self) -> list[Waiting]:
        """Return the first jobs of the first blocked shapes, in order, as many as the depth says."""
        firsts = [queue[0] for queue in self._queues.values()]
        heapq.heapify(firsts)
        heads: list[Waiting] = []
        while firsts and len(heads) < self.rules.depth:
            _, _, waiting = heapq.heappop(firsts)
            if large_enough(waiting, self.books.values()):
                heads.append(waiting)
        return heads

    def _reserve_anew(self) -> None:
        """Make the reservations anew until nothing starts by it. Each round fills the workers that gained room."""
        if not self.rules.depth:
            return
        while True:
            before, running = self.reservations, len(self.starts)
            self.reservations = self._reservations(self._heads())
            for worker, earlier in before.items():
                if self.reservations.get(worker) != earlier:
                    self._fill(worker)
            if len(self.starts) == running:
                break
        for entry in self.reservations.values():
            self._look_at(entry.at + 1 if entry.at else 0)

    def _reservations(self, heads: Sequence[Waiting]) -> dict[str, Reservation]:
        """Return the reservations of these heads by worker."""
        held = {worker: list(jobs.values()) for worker, jobs in self.held.items()}
        shapes = [entry.shape for entry in self.reservations.values() if entry.shape in self._queues]
        firsts = {shape: self._queues[shape][0][2] for shape in shapes}
        books = list(self.books.values())
        renewed = renew(heads, books, held, self.now, self.rules, self.reservations, self.patience, firsts)
        for head in heads:
            self._look_at(self.patience.since(head, self.now) + self.rules.reserve_after)
        self.overruns += renewed.overruns
        self.keepings += renewed.keepings
        return renewed.reservations

    def _look_at(self, time: int) -> None:
        if time > self.now and time not in self._looks:
            self._looks.add(time)
            heapq.heappush(self._events, (time, _LOOK, 0, "", ""))


def simulate(
    submissions: Iterable[Submission], books: Mapping[str, Book], rules: Rules, expectations: Expectations
) -> Simulation:
    """Return the simulation of these jobs on these workers after its last event."""
    simulation = Simulation(dict(books), rules, expectations)
    simulation.run(submissions)
    return simulation
