"""Families of the dashboard: a reading as Prometheus takes it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Final

from celery_capacity.platform.web.metrics.reading import Reading
from celery_capacity.routing.inspect.overview import Overview
from celery_capacity.routing.inspect.waiting import BacklogLine
from celery_capacity.routing.model.amounts import SLOTS
from celery_capacity.routing.model.reasons import Refusal
from celery_capacity.routing.model.request import Request
from celery_capacity.routing.model.states import Store
from celery_capacity.routing.policy.labels import place_of
from celery_capacity.workers.supervision import metric_names as names
from celery_capacity.workers.supervision.exposition import Families, add_resources, authority_families, family, single
from celery_capacity.workers.supervision.metric_names import OTHER, label_of

#: Shapes of the backlog that have a series of their own, those with the most waiting jobs.
MAX_SHAPES: Final = 50
#: Counters of refused writes: the attempt had lost its lease.
STALE: Final = ("stale.release", "stale.publish", "stale.commit", "stale.adopt")
#: Beginning of the counters of passes: `duty.NAME.result`.
DUTY: Final = "duty."


@dataclass(frozen=True, slots=True)
class Reads:
    """How many overviews a dashboard read from the ledger, and for how many it asked Postgres instead."""

    ledger: int
    postgres: int


def families(reading: Reading, reads: Reads) -> Families:
    """Yield the families of a reading, without those that nobody could read."""
    up = family(names.UP)
    up.add_metric(["redis"], reading.redis_up)
    up.add_metric(["postgres"], reading.postgres_up)
    yield up
    if reading.overview is not None:
        yield from _workers(reading.overview)
        yield from _backlog(reading.overview)
        yield from _counters(reading.overview)
        yield from _numbers(reading.overview)
    if reading.authority is not None:
        yield from authority_families(reading.authority.authority, reading.authority.epoch)
    if reading.open_jobs is not None:
        jobs = family(names.JOBS)
        for state, number in reading.open_jobs.items():
            jobs.add_metric([state], number)
        yield jobs
        yield from _ended(reading)
    yield single(names.HITS, reads.ledger)
    yield single(names.MISSES, reads.postgres)


def _workers(overview: Overview) -> Families:
    capacity, allocated, ages = family(names.CAPACITY), family(names.ALLOCATED), family(names.HEARTBEAT_AGE)
    for worker in overview.workers:
        add_resources(capacity, allocated, worker.name, worker.capacity, worker.allocated)
        if worker.heartbeat_age is not None:
            ages.add_metric([worker.name], worker.heartbeat_age)
    yield from (capacity, allocated, ages)


def _backlog(overview: Overview) -> Families:
    waiting: Counter[str] = Counter()
    for line in overview.backlog:
        waiting[shape_label(line)] += line.waiting
    largest = dict(sorted(waiting.items(), key=lambda pair: (-pair[1], pair[0]))[:MAX_SHAPES])
    rest = waiting.total() - sum(largest.values())
    backlog = family(names.BACKLOG)
    for shape, number in (*largest.items(), (OTHER, rest)):
        backlog.add_metric([shape], number)
    yield backlog
    yield single(names.OLDEST, max((line.oldest or 0.0 for line in overview.backlog), default=0.0))
    yield single(names.BLOCKED, sum(line.waiting for line in overview.backlog if line.blocked is not None))


def shape_label(line: BacklogLine) -> str:
    """Return the request of waiting jobs as a label: `cpus=4 memory=2147483648 queue=celery`.

    A single slot, which every job asks for, is not worth a word. Alternatives stand in order: `gpus=1 or cpus=32`.
    """
    requests = " or ".join(_amounts(request) for request in line.alternatives or (line.request,))
    words = (requests, f"queue={line.request.queue}", str(place_of(line.terms)))
    return label_of(" ".join(filter(None, words)))


def _amounts(request: Request) -> str:
    amounts = request.to_people().items()
    return " ".join(f"{name}={amount}" for name, amount in amounts if (name, amount) != (SLOTS, 1))


def _counters(overview: Overview) -> Families:
    """Yield what the ledger counts. An overview from Postgres has no counters, and then no family is better than 0."""
    if overview.source is not Store.LEDGER:
        return
    counters = overview.counters
    refusals, duties = family(names.REFUSALS), family(names.DUTIES)
    for refusal in Refusal:
        refusals.add_metric([refusal.value], counters.get(refusal.value, 0))
    for name, number in counters.items():
        if name.startswith(DUTY):
            duty, _, result = name.removeprefix(DUTY).rpartition(".")
            duties.add_metric([duty, result], number)
    yield from (refusals, duties)
    yield single(names.FENCED, sum(counters.get(name, 0) for name in STALE))
    yield single(names.DRIFT, counters.get("drift", 0))
    yield single(names.LOSSES, counters.get("lost", 0))


def _numbers(overview: Overview) -> Families:
    if overview.unapplied is not None:
        yield single(names.UNAPPLIED, overview.unapplied)
        yield single(names.UNAPPLIED_AGE, overview.unapplied_age or 0.0)
    if overview.quarantine is not None:
        yield single(names.QUARANTINED, overview.quarantine.messages)


def _ended(reading: Reading) -> Families:
    ended = family(names.ENDED)
    for state, number in sorted(reading.ended.states.items()):
        ended.add_metric([state], number)
    waits, runs = family(names.WAIT), family(names.RUN)
    reading.ended.waits.put_into(waits, [])
    for task, histogram in sorted(reading.ended.runs.items()):
        histogram.put_into(runs, [task])
    yield from (ended, waits, runs)
