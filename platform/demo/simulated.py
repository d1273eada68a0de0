"""A trace in virtual time: the jobs and workers for `routing.simulation.simulation`, and the numbers of its report."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from celery_capacity.platform.demo import trace
from celery_capacity.platform.demo.trace import Record
from celery_capacity.platform.processes.launch import WorkerSpec
from celery_capacity.routing.errors import InvalidRequest
from celery_capacity.routing.model.amounts import CPUS, GPUS, MEMORY, SLOTS, cpus_number
from celery_capacity.routing.model.request import Request
from celery_capacity.routing.policy.placement import Book
from celery_capacity.routing.policy.reservation import Rules
from celery_capacity.routing.policy.tenants import DEFAULT_TENANT, Rule, Sharing, mean_time, tenant_of, tenant_term
from celery_capacity.routing.simulation.expectations import SOURCES, Counted, Expectations
from celery_capacity.routing.simulation.jobs import Submission
from celery_capacity.routing.simulation.shares import Shares
from celery_capacity.routing.simulation.simulation import simulate

if TYPE_CHECKING:
    from celery_capacity.platform.demo.replay import Replayed

#: Milliseconds in a second.
MS: Final = 1000
#: Seconds in which past use of tenants halves, as PLATFORM_SHARE_HALF_LIFE is by default.
SHARE_HALVES_IN: Final = 600.0
#: Percentiles of waits in JSON, by name.
PERCENTILES: Final = {"p50": 50, "p95": 95, "max": 100}


@dataclass(frozen=True)
class Case:
    """Input of a simulation: the jobs of a trace, with their rows as names, and empty workers.

    `shares`: of tenants, None where tenants are not in use.
    """

    name: str
    scale: float
    jobs: Sequence[Submission]
    books: Mapping[str, Book]
    shares: Shares | None = None

    @classmethod
    def of_trace(cls, replayed: Replayed, weights: Mapping[str, int], halves_in: float = SHARE_HALVES_IN) -> Case:
        """Return the case of a trace, with weights of tenants. Tenants are in use where the trace names one, too."""
        planned = trace.plan(replayed.jobs, replayed.scale)
        jobs = [
            Submission(
                str(entry.job.row),
                round(entry.at * MS),
                max(1, round(entry.seconds * MS)),
                Request.of({CPUS: entry.job.cpus}),
                entry.job.task,
                terms=tenant_term(entry.job.tenant or DEFAULT_TENANT),
            )
            for entry in planned
        ]
        rules = {tenant: Rule(weight) for tenant, weight in weights.items()}
        return cls(replayed.name, replayed.scale, jobs, books_of(replayed.workers)).sharing(rules, halves_in)

    def sharing(self, rules: Mapping[str, Rule], halves_in: float = SHARE_HALVES_IN) -> Case:
        """Return the case with rules of tenants. Without any, tenants are in use where a job names one."""
        if not rules and not any(tenant_of(job.terms) != DEFAULT_TENANT for job in self.jobs):
            return self
        total: Counter[str] = Counter()
        for book in self.books.values():
            total.update(book.capacity)
        return replace(self, shares=Shares(Sharing(rules, total=total), mean_time(halves_in)))


@dataclass(frozen=True)
class Simulated:
    """A finished simulation. Times in seconds. `makespan_least`: no order of the jobs could be done earlier.

    `waits`: by job, of those that started. `never`: the number of the others.
    """

    case: Case
    rules: Rules
    expected: str
    records: Sequence[Record]
    waits: Mapping[int, float]
    makespan: float
    makespan_least: float
    overruns: int
    keepings: int

    @property
    def packing(self) -> float:
        """Return the makespan over the least one: 1 is perfect."""
        return self.makespan / self.makespan_least if self.makespan_least else 1.0

    @property
    def wait_mean(self) -> float:
        """Return the mean wait of all jobs."""
        return sum(self.waits.values()) / len(self.waits)

    @property
    def never(self) -> int:
        """Return the number of the jobs that no worker ever takes."""
        return len(self.case.jobs) - len(self.waits)

    def wait(self, percent: float) -> float:
        """Return a percentile of the waits; 100 is the longest."""
        return trace.percentile(self.waits.values(), percent)

    def tenants(self) -> dict[str, list[float]]:
        """Return the waits of each tenant's jobs in seconds, by name; empty where tenants are not in use."""
        waits: dict[str, list[float]] = defaultdict(list)
        for job in self.case.jobs if self.case.shares is not None else ():
            waits[tenant_of(job.terms)] += [self.waits[int(job.job)]] if int(job.job) in self.waits else []
        return dict(sorted(waits.items()))

    def workers(self) -> list[tuple[Book, int, int]]:
        """Return each worker with its average of allocated millicores, and its number of jobs."""
        cpus = {int(job.job): job.request.get(CPUS) for job in self.case.jobs}
        averages = trace.averages(self.records, cpus, self.makespan)
        jobs = Counter(record.worker for record in self.records)
        return [(book, averages.get(name, 0), jobs[name]) for name, book in self.case.books.items()]

    def to_json(self) -> dict[str, Any]:
        """Return the object that `simulate --json` prints, in seconds and CPUs."""
        return {
            "trace": self.case.name,
            "scale": self.case.scale,
            "jobs": len(self.case.jobs),
            "never": self.never,
            "depth": self.rules.depth,
            "reserve_after_seconds": self.rules.reserve_after / MS,
            "expected": self.expected,
            "makespan_seconds": round(self.makespan, 3),
            "makespan_least_seconds": round(self.makespan_least, 3),
            "packing": round(self.packing, 4),
            "wait_seconds": {
                "mean": round(self.wait_mean, 3),
                "p50": round(self.wait(50), 3),
                "p95": round(self.wait(95), 3),
                "max": round(self.wait(100), 3),
            },
            "overruns": self.overruns,
            "kept": self.keepings,
            "workers": [
                {
                    "name": book.worker,
                    "cpus": cpus_number(book.capacity.get(CPUS, 0)),
                    "average_cpus": cpus_number(average),
                    "jobs": jobs,
                }
                for book, average, jobs in self.workers()
            ],
            "tenants": [
                {
                    "tenant": tenant,
                    "starts": len(waits),
                    "wait_seconds": {
                        "mean": round(sum(waits) / len(waits), 3),
                        **{name: round(trace.percentile(waits, p), 3) for name, p in PERCENTILES.items()},
                    }
                    if waits
                    else None,
                }
                for tenant, waits in self.tenants().items()
            ],
        }


def books_of(workers: Sequence[WorkerSpec]) -> dict[str, Book]:
    """Return the books of empty workers, by name."""
    return {spec.name: Book(spec.name, _capacity(spec), {}) for spec in workers}


def _capacity(spec: WorkerSpec) -> Mapping[str, int]:
    amounts = {
        CPUS: spec.cpus,
        SLOTS: spec.slots,
        MEMORY: spec.memory or 0,
        GPUS: spec.gpus or 0,
        **dict(spec.resources),
    }
    return {name: amount for name, amount in amounts.items() if amount}


def run(case: Case, rules: Rules, expected: str, ended: Callable[[], object] | None = None) -> Simulated:
    """Simulate a trace. `expected`: the source of expected run times, one of `SOURCES`. Raise InvalidRequest.

    At least one job must find a worker that is large enough. `ended` is called when a job has ended.
    """
    source: Expectations = SOURCES[expected]()
    counted = source if ended is None else Counted(source, ended)
    simulation = simulate(case.jobs, case.books, rules, counted, case.shares)
    starts = simulation.starts
    if not starts:
        raise InvalidRequest(
            "no worker could ever take a job of this trace",
            value=None,
            advice="Give workers with all resources of the jobs: --worker gpu=cpus:32,memory:256GiB,gpus:4",
        )
    records = [Record(int(start.job), start.started / MS, start.ended / MS, start.worker) for start in starts]
    cpus = {job.job: job.request.get(CPUS) for job in case.jobs}
    work = sum(cpus[start.job] * (start.ended - start.started) for start in starts)
    unhindered = max(start.submitted + start.ended - start.started for start in starts)
    total = sum(book.capacity.get(CPUS, 0) for book in case.books.values())
    return Simulated(
        case,
        simulation.rules,
        expected,
        records,
        {int(start.job): (start.started - start.submitted) / MS for start in starts},
        makespan=max(start.ended for start in starts) / MS,
        makespan_least=max(unhindered, work / total if total else 0) / MS,
        overruns=simulation.overruns,
        keepings=simulation.keepings,
    )
