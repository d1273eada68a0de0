"""The circuit breaker of senders: a ledger that is slow or silent costs them a moment once, not with each job.

A durable row is accepted, whatever Redis does. Only its way into the ledger is then left to the sweep. So a sender asks
the ledger as long as the ledger answers quickly. The first failure or slow answer *opens* the breaker. From then on
nobody asks, and a thread looks by itself. The breaker *closes* when an answer comes quickly again. While it is closed,
nothing looks, and the ledger gets no question beyond those of the senders.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import groupby
from typing import Any, TypeVar

import redis
from redis.exceptions import RedisError

from celery_capacity.routing.config import timeouts
from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.errors import StoreUnavailable
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.ledger.connection import connect
from celery_capacity.routing.ledger.replies import LedgerClosed
from celery_capacity.workers.dispatch import call_budget
from celery_capacity.workers.dispatch.circuit import SLOW, Circuit
from celery_capacity.workers.dispatch.submission_queue import Beginning, Submission, Submissions

T = TypeVar("T")


class Breaker:
    """Senders' own handle of the ledger. Thread-safe. Not carried over a fork: `Stores` makes a new one there."""

    def __init__(self, settings: Settings, find_database: Callable[[], str] | None = None) -> None:
        answer_within = timeouts.QUICK_ANSWER * settings.store_timeout
        self._within = timeouts.QUICK_ATTEMPT * settings.store_timeout
        client = connect(str(settings.redis_url), socket_connect_timeout=answer_within, socket_timeout=answer_within)
        self._ledger = Ledger(settings, call_budget.bounded(client))
        self._ledger.find_database = find_database
        self._submissions = Submissions(self._bring)
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
        """Ask the ledger, once it has the jobs that were submitted before, and return its answer.

        Returns None where the ledger is left alone, or does not answer. Raises `LedgerClosed`.
        """
        self._submissions.flush()
        return self._ask(question)

    def begin(self) -> Beginning:
        """Mark the moment at which a sender begins with a job."""
        return self._submissions.begin()

    def submit(self, job: Submission, began: Beginning, *, alone: bool) -> None:
        """Bring a durable job to the ledger.

        `began`: the value that `begin` returned. `alone`: bring the job before this returns. The duties bring in jobs
        that the ledger does not hear of or take.
        """
        if self._circuit.closed:
            self._submissions.add(job, began, alone=alone)

    def flush(self) -> bool:
        """Wait until the ledger was told of all submitted jobs. Returns True if it was."""
        return self._submissions.flush()

    def _bring(self, jobs: Sequence[Submission]) -> None:
        for epoch, together in groupby(jobs, key=lambda job: job.epoch):
            # The ledger is cold, or of another epoch: a worker opens it, and brings in the accepted jobs.
            with suppress(LedgerClosed):
                self._ask(partial(_submit, epoch, [job.args for job in together]))

    def _ask(self, question: Callable[[Ledger], T]) -> T | None:
        if not self._circuit.closed:
            return None
        began = time.monotonic()
        try:
            with call_budget.attempt(self._within):
                answer = question(self._ledger)
        except (StoreUnavailable, RedisError) as error:
            self._circuit.trip(str(error))
            return None
        if (took := time.monotonic() - began) > SLOW:
            self._circuit.trip(f"an answer took {took:.1f} s")
        return answer

    @property
    def client(self) -> redis.Redis:
        """Return the client of this handle."""
        return self._ledger.client

    def descriptors(self) -> list[int]:
        """Return the sockets of this handle, as numbers, for a child that inherited them."""
        return self._ledger.descriptors()

    def close(self) -> None:
        """End the connections, and the thread where there is one."""
        self._submissions.flush()
        self._circuit.stop(self._within)
        self._ledger.client.close()

    def _ping(self) -> None:
        with call_budget.attempt(self._within):
            self._ledger.client.ping()


def _submit(epoch: int, jobs: list[tuple[Any, ...]], ledger: Ledger) -> bool:
    ledger.epoch = epoch
    if len(jobs) == 1:
        ledger.submit_one(jobs[0])
    else:
        ledger.submit_many(jobs)
    return True
