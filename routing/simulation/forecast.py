"""Forecast of a cluster: the policy's simulation goes on from a copy of its workers, its running jobs and its backlog.

No job comes later. A job ends when it is expected to. A job of an unknown run time stays on its worker, as a
reservation assumes it too: so a start that needs its end is not forecast. Times are milliseconds.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from statistics import median_low
from typing import Final, NamedTuple

from celery_capacity.routing.model.request import alternatives_term
from celery_capacity.routing.policy.placement import Book
from celery_capacity.routing.policy.reservation import Held, Rules, expected_end
from celery_capacity.routing.policy.tenants import tenant_of
from celery_capacity.routing.simulation.expectations import Counted, Unknown
from celery_capacity.routing.simulation.jobs import Queued, Running
from celery_capacity.routing.simulation.shares import Shares
from celery_capacity.routing.simulation.simulation import Simulation

#: Waiting jobs that a forecast takes at most, the first in order.
MAX_JOBS: Final = 2000
#: Workers times jobs, running and waiting ones, beyond which a forecast leaves the reservations out: each end looks at
#: each worker where a head may start. Up to this it takes a second.
MAX_WORK: Final = 500_000


class NoEstimate(StrEnum):
    """Reason for which no start is estimated; the value is the word in JSON."""

    #: the run times of jobs before it, or of running jobs, are unknown
    UNKNOWN_RUN_TIMES = "unknown-run-times"
    #: all run times are known, and no worker would take the job after all ends
    NEVER_FITS = "never-fits"
    #: too many jobs are before it, and too few of them would start
    TOO_FAR = "too-far"
    #: tenants share the workers, and too many jobs wait for their turns to be simulated
    TENANTS = "tenants"


@dataclass(frozen=True)
class Cluster:
    """Copy of a cluster at a time. The books have allocated what `running` holds.

    `waiting`: the first jobs of the backlog, in order. `beyond`: the number of the jobs that come behind them.
    `guessed`: jobs whose run time is the median of the others. `shares`: of tenants, without what `running` holds; None
    where tenants are not in use.
    """

    now: int
    books: Mapping[str, Book]
    running: Sequence[Running] = ()
    waiting: Sequence[Queued] = ()
    beyond: int = 0
    guessed: int = 0
    shares: Shares | None = None


@dataclass(frozen=True)
class Estimate:
    """Estimated start of a job (ms), None where none is known, with the reason.

    `simulated`: the waiting jobs whose starts were simulated. `extrapolated`: the job is behind them, and the time
    follows from their pace. `without_reservations`: the cluster is too large to simulate them.
    """

    at: int | None
    why_not: NoEstimate | None = None
    simulated: int = 0
    extrapolated: bool = False
    without_reservations: bool = False


def running_until(job: str, worker: str, held: Held, run: int, now: int, terms: str = "") -> Running:
    """Return a running job that ends when it is expected to. `run`: milliseconds that it is likely to run.

    A job that has run for longer is taken to run as long as the policy expects, or goes on as an overrun does.
    """
    if not run:
        return Running(job, worker, held, 0, terms)
    likely = run if held.admitted + run > now else max(run, held.expected)
    return Running(job, worker, held, expected_end(held._replace(expected=likely), now), terms)


def leaves_out_reservations(cluster: Cluster, rules: Rules) -> bool:
    """Return True if a forecast by these rules leaves the reservations out, since the cluster is too large."""
    return rules.depth > 0 and len(cluster.books) * (len(cluster.running) + len(cluster.waiting)) > MAX_WORK


def forecast(cluster: Cluster, rules: Rules, until: str = "", ended: Callable[[], object] | None = None) -> Simulation:
    """Return the simulation of a cluster: until a job has started, or until all that can start have ended.

    `ended` is called when a job has ended.
    """
    if leaves_out_reservations(cluster, rules):
        rules = Rules(depth=0)
    shares = None if cluster.shares is None else replace(cluster.shares, now=cluster.now)
    expectations = Unknown() if ended is None else Counted(Unknown(), ended)
    simulation = Simulation(dict(cluster.books), rules, expectations, now=cluster.now, shares=shares)
    simulation.begin(cluster.running, cluster.waiting)
    simulation.advance(until)
    return simulation


def estimate(cluster: Cluster, rules: Rules, job: str) -> Estimate:
    """Return when a waiting job starts.

    A job that is not among `cluster.waiting` is the last one of those beyond them.
    """
    estimated = _estimate(cluster, rules, job)
    return replace(estimated, without_reservations=leaves_out_reservations(cluster, rules))


def _estimate(cluster: Cluster, rules: Rules, job: str) -> Estimate:
    beyond = not any(queued.waiting.job == job for queued in cluster.waiting)
    simulation = forecast(cluster, rules, "" if beyond else job)
    number = len(cluster.waiting)
    if beyond:
        return _extrapolated(cluster, simulation, number)
    started = next((start.started for start in simulation.starts if start.job == job), None)
    if started is not None:
        return Estimate(started, simulated=number)
    unknown = any(not queued.run for queued in cluster.waiting if queued.waiting.job != job)
    unknown |= any(not entry.ends for entry in cluster.running)
    return Estimate(None, NoEstimate.UNKNOWN_RUN_TIMES if unknown else NoEstimate.NEVER_FITS, number)


def _extrapolated(cluster: Cluster, simulation: Simulation, number: int) -> Estimate:
    """Return the start of the last job beyond the simulated ones: the pace of these goes on.

    Among tenants no pace says it: jobs of others come in between.
    """
    if cluster.shares is not None:
        return Estimate(None, NoEstimate.TENANTS, number)
    if any(not queued.run for queued in cluster.waiting) or any(not entry.ends for entry in cluster.running):
        return Estimate(None, NoEstimate.UNKNOWN_RUN_TIMES, number)
    started = len(simulation.starts)
    if 2 * started < number or not started:
        return Estimate(None, NoEstimate.TOO_FAR, number)
    took = simulation.starts[-1].started - cluster.now
    return Estimate(cluster.now + round(took * (number + cluster.beyond) / started), None, number, extrapolated=True)


# -- what would be, if


class Waits(NamedTuple):
    """Waits of some jobs from the time of the copy to their starts, in milliseconds, and the jobs that never start."""

    times: tuple[int, ...]
    never: int = 0

    @property
    def mean(self) -> float:
        """Return the mean wait; 0 where no job starts."""
        return sum(self.times) / len(self.times) if self.times else 0.0

    def percentile(self, percent: float) -> int:
        """Return the smallest wait that at least `percent` of the waits do not exceed; 100 is the longest."""
        return self.times[max(math.ceil(percent / 100 * len(self.times)), 1) - 1] if self.times else 0


@dataclass(frozen=True)
class Outcome:
    """Outcome of a forecast for the waiting jobs. `by_kind`: by task and shape of the request, with alternatives.

    `by_tenant`: empty where tenants are not in use. `without_reservations`: the cluster is too large to simulate them.
    """

    workers: int
    rules: Rules
    waits: Waits
    by_kind: Mapping[tuple[str, str], Waits]
    by_tenant: Mapping[str, Waits] = field(default_factory=dict)
    without_reservations: bool = False

    @property
    def empty_after(self) -> int | None:
        """Return the milliseconds until no job waits; None where some job never starts."""
        return None if self.waits.never else self.waits.percentile(100)


def with_guesses(cluster: Cluster) -> tuple[Cluster, int]:
    """Return the cluster with a guess for each unknown run time, and the guess in milliseconds.

    The guess is the median of the known run times. Where none is known, it is 0, and the jobs stay unknown.
    """
    runs = [queued.run for queued in cluster.waiting if queued.run]
    runs += [entry.ends - entry.held.admitted for entry in cluster.running if entry.ends]
    guess = median_low(runs) if runs else 0
    waiting = [queued if queued.run else queued._replace(run=guess) for queued in cluster.waiting]
    running = [
        entry if entry.ends else running_until(entry.job, entry.worker, entry.held, guess, cluster.now, entry.terms)
        for entry in cluster.running
    ]
    unknown = sum(not queued.run for queued in cluster.waiting) + sum(not entry.ends for entry in cluster.running)
    return replace(cluster, waiting=waiting, running=running, guessed=unknown), guess


def changed(cluster: Cluster, add: Sequence[Book] = (), remove: Sequence[str] = ()) -> Cluster:
    """Return the cluster with more workers, and with workers that admit no more. Running jobs run to their end."""
    removed = {name: replace(cluster.books[name], admitting=False) for name in remove}
    books = {**cluster.books, **removed, **{book.worker: book for book in add}}
    if cluster.shares is None:
        return replace(cluster, books=books)
    total = Counter(cluster.shares.sharing.total)
    for book in add:
        total.update(book.capacity)
    for name in remove:
        total.subtract(cluster.books[name].capacity)
    sharing = replace(cluster.shares.sharing, total=+total)
    return replace(cluster, books=books, shares=replace(cluster.shares, sharing=sharing))


def outcome(cluster: Cluster, rules: Rules, ended: Callable[[], object] | None = None) -> Outcome:
    """Return how long each waiting job of a cluster waits from now on, if no job comes later.

    `ended` is called when a job has ended.
    """
    started = {start.job: start.started - cluster.now for start in forecast(cluster, rules, ended=ended).starts}
    kinds: dict[tuple[str, str], list[str]] = defaultdict(list)
    tenants: dict[str, list[str]] = defaultdict(list)
    for queued in cluster.waiting:
        alternatives = queued.waiting.alternatives
        shape = alternatives[0].shape + alternatives_term(alternatives)
        kinds[queued.waiting.task, shape].append(queued.waiting.job)
        if cluster.shares is not None:
            tenants[tenant_of(queued.waiting.terms)].append(queued.waiting.job)
    admitting = sum(book.admitting for book in cluster.books.values())
    jobs = [queued.waiting.job for queued in cluster.waiting]
    return Outcome(
        admitting,
        rules,
        _waits(jobs, started),
        {kind: _waits(some, started) for kind, some in kinds.items()},
        {tenant: _waits(some, started) for tenant, some in tenants.items()},
        leaves_out_reservations(cluster, rules),
    )


def _waits(jobs: Sequence[str], started: Mapping[str, int]) -> Waits:
    times = sorted(started[job] for job in jobs if job in started)
    return Waits(tuple(times), len(jobs) - len(times))
