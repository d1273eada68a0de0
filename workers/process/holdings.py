"""What a worker holds, by its own count: it never starts what would exceed its capacity, whatever the ledger says."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from celery_capacity.routing.ledger.replies import Adopted
from celery_capacity.routing.model.capacity import Capacity
from celery_capacity.routing.model.request import Request
from celery_capacity.routing.policy.placement import Book, fits


@dataclass(frozen=True, slots=True)
class Holding:
    """One claimed attempt. `started`: it was given to the pool. `ended`: its body is over, and the release is on its
    way."""

    job: str
    token: str
    request: Request
    nonce: str
    admitted_ms: int = 0
    started_ms: int = 0
    losses: int = 0
    rerun: bool = True
    started: bool = False
    ended: bool = False

    @property
    def key(self) -> tuple[str, str]:
        """(job, token): which attempt it is."""
        return self.job, self.token

    def as_adopted(self) -> Adopted:
        """What the books of a new epoch need to know of it. Its place in the backlog is Postgres's to say."""
        return Adopted(
            self.job,
            self.token,
            self.request.shape,
            0,
            self.admitted_ms,
            self.started_ms,
            self.nonce,
            self.losses,
            self.rerun,
        )


@dataclass
class Holdings:
    """Thread-safe. `capacity` in millicores, bytes and counts."""

    capacity: Mapping[str, int]
    #: By job and token: an attempt that lost its lease may still run beside a newer one of the same job.
    _held: dict[tuple[str, str], Holding] = field(default_factory=dict)
    #: Those of them of which the ledger said that they lost their lease.
    _strays: set[tuple[str, str]] = field(default_factory=set)
    #: Jobs that were claimed and whose claim is not answered yet: the ledger may have them as running here. One thread
    #: assigns it, the heartbeat reads.
    claiming: frozenset[str] = frozenset()
    _lock: threading.Lock = field(default_factory=lambda: threading.Lock())

    def book(self) -> Book:
        """What runs here beside the capacity, as a book."""
        book = Book("", self.capacity, {})
        for holding in self.running():
            book = book.holding(holding.request)
        return book

    def admits(self, requests: Mapping[str, Request]) -> set[str]:
        """Which of these jobs fit beside what runs, taken in their order."""
        book = self.book()
        fitting = set()
        for job, request in requests.items():
            if fits(request, book) is None:
                fitting.add(job)
                book = book.holding(request)
        return fitting

    def add(self, holding: Holding) -> None:
        with self._lock:
            self._held[holding.job, holding.token] = holding

    def start(self, job: str, token: str) -> bool:
        """An attempt is given to the pool: its body may begin from now on. False where it is not held any more, or is
        going back."""
        with self._lock:
            holding = self._held.get((job, token))
            if holding is None or holding.ended:
                return False
            self._held[job, token] = replace(holding, started=True)
            return True

    def put_off(self, job: str, token: str) -> None:
        """An attempt that was to be given to the pool is not: its body has not begun."""
        with self._lock:
            if (holding := self._held.get((job, token))) is not None:
                self._held[job, token] = replace(holding, started=False)

    def may_rerun(self, job: str, token: str) -> bool:
        """Return False if the job of an attempt may start only once. One that is not held has been ended already."""
        holding = self.find(job, token)
        return holding is None or holding.rerun

    def end(self, job: str, token: str) -> bool:
        """The body of an attempt is over. False when it is not held, or was over before."""
        with self._lock:
            holding = self._held.get((job, token))
            if holding is None or holding.ended:
                return False
            self._held[job, token] = replace(holding, ended=True)
            return True

    def remove(self, job: str, token: str) -> Holding | None:
        """The release was answered."""
        with self._lock:
            self._strays.discard((job, token))
            return self._held.pop((job, token), None)

    def disown(self, attempts: Collection[tuple[str, str]]) -> None:
        """These attempts (job, token) have lost their lease. Their bodies go on, and take up room."""
        with self._lock:
            self._strays |= self._held.keys() & set(attempts)

    def left_of(self, capacity: Capacity) -> Capacity:
        """The part of a capacity that is not taken up by attempts which lost their lease: the books know nothing of
        those, and would offer their room again and again."""
        with self._lock:
            strays = [one for key, one in self._held.items() if key in self._strays and not one.ended]
        left = dict(capacity.amounts)
        for stray in strays:
            for name, amount in stray.request.amounts:
                left[name] = max(0, left.get(name, 0) - amount)
        return Capacity.of(left)

    def find(self, job: str, token: str) -> Holding | None:
        """One attempt, if it is held."""
        with self._lock:
            return self._held.get((job, token))

    def jobs(self) -> list[str]:
        """All that is held, also what has ended and is not released yet: the list for the heartbeat."""
        with self._lock:
            return list(dict.fromkeys(job for job, _ in self._held))

    def all(self) -> list[Holding]:
        """The same, as it is held."""
        with self._lock:
            return list(self._held.values())

    def running(self) -> list[Holding]:
        """What runs."""
        with self._lock:
            return [holding for holding in self._held.values() if not holding.ended]
