"""Redis commands for a job by the way of its life, counted on a ledger without processes: the same in every run."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence

from benchmarks.books import MOST_LOSSES, REQUEST, Books
from benchmarks.costs.reading import Meter
from celery_capacity.routing.ledger.replies import Arrived, Ended
from celery_capacity.routing.model.states import Outcome
from celery_capacity.routing.model.token import Token

#: Jobs of a batch, as a busy worker settles them.
BATCH = 16

#: A worker and the capacity that it publishes: for all jobs of a batch, or for a single job.
ROOMY, NARROW = f"cpus={BATCH}000,slots={BATCH}", "cpus=1000,slots=1"


def alone(opened: Books) -> int:
    """Take one job through its life: submitted, admitted at once, claimed and ended."""
    job, place = opened.new_job()
    opened.ledger.submit(job, REQUEST, place, opened.message)
    _run(opened, [job])
    return 1


def together(opened: Books) -> int:
    """Take a batch of jobs through their lives. Each script is called once for all of them."""
    jobs = _submit(opened)
    _run(opened, jobs)
    return len(jobs)


def in_line(opened: Books) -> int:
    """File a batch of jobs behind a worker with room for one, and let each end admit the next."""
    jobs = _submit(opened)
    for job in jobs:
        _run(opened, [job])
    return len(jobs)


#: The ways by name, and the capacity of their worker.
LIVES: Mapping[str, tuple[Callable[[Books], int], str]] = {
    "alone": (alone, ROOMY),
    "together": (together, ROOMY),
    "in_line": (in_line, NARROW),
}


def commands(opened: Books) -> dict[str, float]:
    """Return the Redis commands for a job, those in scripts included, by the way of its life.

    The ledger of the books is new, and its epoch open.
    """
    meter = Meter(opened.ledger.client)
    counts = {}
    for name, (live, capacity) in LIVES.items():
        opened.register("w", capacity)
        live(opened)  # loads the scripts
        before = meter.read()
        jobs = live(opened)
        counts[name] = meter.costs(jobs, before).per_job()["commands"]
        opened.leave("w")
    return counts


def _submit(opened: Books) -> list[str]:
    """Submit a batch in one call, and return the jobs in their order."""
    placed = [opened.new_job() for _ in range(BATCH)]
    opened.ledger.submit_many([(job, REQUEST, place, opened.message, 0, 0, 0) for job, place in placed])
    return [job for job, _ in placed]


def _run(opened: Books, jobs: Sequence[str]) -> None:
    """Claim admitted jobs, end them, and acknowledge all that this wrote. Raise RuntimeError if a claim fails."""
    ledger, incarnation = opened.ledger, opened.incarnation("w")
    token = Token(ledger.epoch, 1)
    arrived = [Arrived(job, token, str(uuid.uuid4())) for job in jobs]
    settled = ledger.settle("w", incarnation, arrived=arrived, most_losses=MOST_LOSSES)
    if not all(claim.ok for claim in settled.claimed):
        raise RuntimeError("the worker could not claim what was admitted to it")
    ended = [Ended(job, token, Outcome.SUCCEEDED) for job in jobs]
    released = ledger.settle("w", incarnation, ended=ended, most_losses=MOST_LOSSES).released
    ledger.ack_transitions([(release.entry, job) for release, job in zip(released, jobs, strict=True)])
