"""Shares of tenants in virtual time, and the order in which a pass over a worker tries the waiting jobs by them."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass

from celery_capacity.routing.model.request import Request
from celery_capacity.routing.policy.placement import SUBMISSIONS, Waiting
from celery_capacity.routing.policy.tenants import Sharing, tenant_of


@dataclass
class Shares:
    """Use of tenants at a time of the simulation.

    `mean_time`: milliseconds for which past use counts, as `policy.tenants.mean_time` returns them; 0 where none does.
    """

    sharing: Sharing
    mean_time: float = 0.0
    now: int = 0

    def may_start(self, waiting: Waiting) -> bool:
        """Return True if the quota of its tenant lets a job start."""
        return self.sharing.may_start(waiting)

    def start(self, terms: str, request: Request) -> None:
        """Count what a job holds from now on."""
        self.sharing = self.sharing.holding(terms, request)

    def end(self, terms: str, request: Request, run: int) -> None:
        """Count no more what a job held. It ran for so many milliseconds."""
        self.sharing = self.sharing.releasing(terms, request, run, self.mean_time)

    def age(self, now: int) -> None:
        """Let past use decay until a time (ms)."""
        if now > self.now and self.sharing.past:
            self.sharing = self.sharing.later(now - self.now, self.mean_time)
        self.now = now

    def has_quota(self, terms: str) -> bool:
        """Return True if the tenant of jobs with these terms has a quota."""
        return bool(self.sharing.rule(tenant_of(terms)).quota)


class Turns:
    """First waiting jobs of their shapes, which come out by priority, by the turn of their tenant, and by order."""

    def __init__(self, shares: Shares, firsts: Iterable[Waiting]) -> None:
        self._shares = shares
        self._queues: dict[str, list[tuple[int, str, Waiting]]] = {}
        for waiting in firsts:
            self.add(waiting)

    def add(self, waiting: Waiting) -> None:
        """Add the first job of a shape."""
        queue = self._queues.setdefault(tenant_of(waiting.terms), [])
        heapq.heappush(queue, (waiting.order, waiting.job, waiting))

    def next(self) -> Waiting | None:
        """Take out the job whose turn it is; None where none is left."""
        sharing = self._shares.sharing
        candidates = [
            (queue[0][0] // SUBMISSIONS, sharing.borrows(tenant), sharing.level(tenant), *queue[0][:2], tenant)
            for tenant, queue in self._queues.items()
        ]
        if not candidates:
            return None
        tenant = min(candidates)[-1]
        queue = self._queues[tenant]
        waiting = heapq.heappop(queue)[2]
        if not queue:
            del self._queues[tenant]
        return waiting
