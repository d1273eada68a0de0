"""The circuit breaker of senders: a ledger that is slow or silent costs them a moment once, not with each job.

A durable row is accepted, whatever Redis does. Only its way into the ledger is then left to the sweep. So a sender asks
the ledger as long as the ledger answers quickly. The first failure or slow answer *opens* the breaker. From then on
nobody asks, and a thread looks by itself. The breaker *closes* when an answer comes quickly again. While it is closed,
nothing looks, and the ledger gets no question beyond those of the senders.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import groupby
from operator import attrgetter
from typing import Any, Final, NamedTuple, TypeVar

from celery_capacity.routing.config import timeouts
from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.ledger.connection import connect
from celery_capacity.routing.ledger.replies import LedgerClosed
from celery_capacity.routing.model.job import NewJob
from celery_capacity.routing.model.request import filed_shape
from celery_capacity.routing.policy.placement import order
from celery_capacity.workers.dispatch import call_budget
from celery_capacity.workers.dispatch.circuit import Circuit

T = TypeVar("T")

_epoch: Final = attrgetter("epoch")


class Submission(NamedTuple):
    """Job for `Ledger.submit`: its arguments, in the epoch that the insert of its row confirmed.

    `size`: the bytes of its message.
    """

    epoch: int
    args: tuple[Any, ...]
    size: int = 0


def ledger_row(job: NewJob, seq: int, now_ms: int, began_ms: float) -> tuple[Any, ...]:
    """Return the arguments of `Ledger.submit` for a new job, whose row was written after `began_ms`."""
    filed = filed_shape(job.shape, job.name)
    return (job.id, filed, order(job.priority, seq), job.message, 0, 0, now_ms, began_ms, job.rerun)


class Breaker:
    """Senders' own handle of the ledger. Thread-safe. Not carried over a fork: `Stores` makes a new one there."""

    def __init__(self, settings: Settings, find_database: Callable[[], str] | None = None) -> None:
        answer_within = timeouts.QUICK_ANSWER * settings.store_timeout
        self._within = timeouts.QUICK_ATTEMPT * settings.store_timeout
        #: The client of this handle.
        self.client = call_budget.bounded(
            connect(str(settings.redis_url), socket_connect_timeout=answer_within, socket_timeout=answer_within)
        )
        self._ledger = Ledger(settings, self.client)
        self._ledger.find_database = find_database
        self._circuit = Circuit(
            self._ping,
            "the ledger is left alone until it answers quickly (jobs are accepted meanwhile)",
            "the ledger answers again",
        )

    @property
    def closed(self) -> bool:
        """Return True if the ledger is asked."""
        return self._circuit.closed

    def ask(self, question: Callable[[Ledger], T]) -> T | None:
        """Ask the ledger, and return its answer.

        Returns None where the ledger is left alone, or does not answer. Raises `LedgerClosed`.
        """
        answer = None
        if self._circuit.closed:
            with self._circuit.call(), call_budget.attempt(self._within):
                answer = question(self._ledger)
        return answer

    def submit(self, jobs: Sequence[Submission]) -> None:
        """Bring durable jobs to the ledger, those of one epoch in one step.

        The duties bring in jobs that the ledger does not hear of or take.
        """
        for epoch, together in groupby(jobs, key=_epoch):
            if not self._circuit.closed:
                return
            rows = [job.args for job in together]
            # The ledger is cold, or of another epoch: a worker opens it, and brings in the accepted jobs.
            with suppress(LedgerClosed), self._circuit.call(), call_budget.attempt(self._within):
                self._ledger.epoch = epoch
                if len(rows) == 1:
                    self._ledger.submit_one(rows[0])
                else:
                    self._ledger.submit_many(rows)

    def descriptors(self) -> list[int]:
        """Return the sockets of this handle, as numbers, for a child that inherited them."""
        return self._ledger.descriptors()

    def close(self) -> None:
        """End the connections, and the thread where there is one."""
        self._circuit.stop(self._within)
        self.client.close()

    def _ping(self) -> None:
        with call_budget.attempt(self._within):
            self.client.ping()
