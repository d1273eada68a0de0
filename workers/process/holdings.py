"""Attempts that a worker holds, by its own count.

A worker never starts a job that would exceed its capacity, whatever the ledger says.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from celery_capacity.routing.ledger.replies import Adopted
from celery_capacity.routing.model.capacity import Capacity
from celery_capacity.routing.model.request import Request
from celery_capacity.routing.model.token import Token
from celery_capacity.routing.policy.placement import Book, fits


class Holding(NamedTuple):
    """Claimed attempt. `started`: given to the pool. `ended`: its body is over, and its release is on the way."""

    job: str
    token: Token
    request: Request
    nonce: str
    admitted_ms: int = 0
    started_ms: int = 0
    losses: int = 0
    rerun: bool = True
    started: bool = False
    ended: bool = False
    #: Shape under which the ledger files the job, with its task; "" where that is the request alone.
    filed: str = ""
    #: When the job was submitted, or due by its row; 0 where the store that decides does not know.
    submitted_ms: int = 0

    @property
    def key(self) -> tuple[str, Token]:
        """Return the pair (job, token) that identifies the attempt."""
        return self.job, self.token

    def as_adopted(self) -> Adopted:
        """Return the facts that the books of a new epoch need. Postgres tells the place in the backlog."""
        return Adopted(
            self.job,
            self.token,
            self.filed or self.request.shape,
            0,
            self.admitted_ms,
            self.started_ms,
            self.nonce,
            self.losses,
            self.rerun,
        )


@dataclass
class Holdings:
    """Attempts that a worker holds beside its capacity. Thread-safe. `capacity` in millicores, bytes and counts."""

    capacity: Mapping[str, int]
    #: Names of the tasks that the worker has registered; None before it has.
    tasks: frozenset[str] | None = None
    #: Returns the milliseconds until the worker ends, None where no end is known.
    left: Callable[[], int | None] = lambda: None
    #: Name and labels of the worker.
    worker: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    #: By job and token, since an attempt that lost its lease may still run beside a newer attempt of the job.
    _held: dict[tuple[str, Token], Holding] = field(default_factory=dict)
    #: Attempts whose lease the ledger reported as lost.
    _strays: set[tuple[str, Token]] = field(default_factory=set)
    #: Jobs whose claim is sent and not answered yet: the ledger may have them as running here. One thread assigns the
    #: set, the heartbeat reads it.
    claiming: frozenset[str] = frozenset()
    #: Re-entrant: a signal may end jobs in the main thread, whatever it is doing.
    _lock: Any = field(default_factory=lambda: threading.RLock())

    def book(self) -> Book:
        """Return a book of the capacity and the running attempts."""
        book = Book(self.worker, self.capacity, {}, tasks=self.tasks, left=self.left(), labels=self.labels)
        for holding in self.running():
            book = book.holding(holding.request)
        return book

    def admits(self, requests: Mapping[str, Request]) -> set[str]:
        """Return the jobs that fit beside the running attempts, taken in their order."""
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

    def start(self, job: str, token: Token) -> bool:
        """Note that an attempt is given to the pool: its body may begin from now on.

        Returns False where the attempt is not held any more, or is going back.
        """
        with self._lock:
            holding = self._held.get((job, token))
            if holding is None or holding.ended:
                return False
            self._held[job, token] = holding._replace(started=True)
            return True

    def put_off(self, job: str, token: Token) -> None:
        """Note that an attempt is not given to the pool after all: its body has not begun."""
        with self._lock:
            if (holding := self._held.get((job, token))) is not None:
                self._held[job, token] = holding._replace(started=False)

    def may_rerun(self, job: str, token: Token) -> bool:
        """Return False if an attempt's job may start only once. An attempt that is not held has been ended already."""
        holding = self.find(job, token)
        return holding is None or holding.rerun

    def end(self, job: str, token: Token) -> bool:
        """Note that the body of an attempt is over. Returns False if it is not held, or was over before."""
        with self._lock:
            holding = self._held.get((job, token))
            if holding is None or holding.ended:
                return False
            self._held[job, token] = holding._replace(ended=True)
            return True

    def remove(self, job: str, token: Token) -> Holding | None:
        """Forget an attempt whose release was answered, and return its holding."""
        with self._lock:
            self._strays.discard((job, token))
            return self._held.pop((job, token), None)

    def disown(self, attempts: Collection[tuple[str, Token]]) -> None:
        """Note that attempts (job, token) have lost their lease. Their bodies go on, and take up room."""
        with self._lock:
            self._strays |= self._held.keys() & set(attempts)

    def left_of(self, capacity: Capacity) -> Capacity:
        """Return the part of a capacity that is not taken up by attempts which lost their lease.

        The books know nothing of these attempts, and would offer their room again and again.
        """
        with self._lock:
            strays = [holding for key, holding in self._held.items() if key in self._strays and not holding.ended]
        left = dict(capacity.amounts)
        for stray in strays:
            for name, amount in stray.request.amounts:
                left[name] = max(0, left.get(name, 0) - amount)
        return Capacity.of(left)

    def find(self, job: str, token: Token) -> Holding | None:
        """Return the holding of an attempt, None if it is not held."""
        with self._lock:
            return self._held.get((job, token))

    def jobs(self) -> list[str]:
        """Return the jobs for the heartbeat: all that are held, also ended jobs that are not released yet."""
        with self._lock:
            return list(dict.fromkeys(job for job, _ in self._held))

    def all(self) -> list[Holding]:
        """Return all holdings, also holdings that have ended and are not released yet."""
        with self._lock:
            return list(self._held.values())

    def running(self) -> list[Holding]:
        """Return the holdings whose body is not over."""
        with self._lock:
            return [holding for holding in self._held.values() if not holding.ended]
