"""A trace in virtual time: the jobs and workers for `routing.simulation.simulation`, and the numbers of its report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from celery_capacity.platform.demo import trace
from celery_capacity.platform.demo.replay import Replayed
from celery_capacity.platform.demo.trace import Record
from celery_capacity.platform.processes.launch import WorkerSpec
from celery_capacity.routing.model.amounts import CPUS, GPUS, MEMORY, SLOTS, cpus_number
from celery_capacity.routing.model.request import Request
from celery_capacity.routing.policy.placement import Book
from celery_capacity.routing.policy.reservation import Rules
from celery_capacity.routing.simulation.expectations import SOURCES
from celery_capacity.routing.simulation.jobs import Submission
from celery_capacity.routing.simulation.simulation import Simulation, simulate

#: Milliseconds in a second.
MS: Final = 1000


@dataclass(frozen=True)
class Simulated:
    """A finished simulation. Times in seconds. `makespan_least`: no order of the jobs could be done earlier."""

    replayed: Replayed
    rules: Rules
    expected: str
    records: Sequence[Record]
    waits: Sequence[float]
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
        return sum(self.waits) / len(self.waits)

    def wait(self, percent: float) -> float:
        """Return a percentile of the waits; 100 is the longest."""
        return trace.percentile(self.waits, percent)

    def workers(self) -> list[tuple[WorkerSpec, int, int]]:
        """Return each worker with its average of allocated millicores, and its number of jobs."""
        cpus = {job.row: job.cpus for job in self.replayed.jobs}
        averages = trace.averages(self.records, cpus, self.makespan)
        jobs = Counter(record.worker for record in self.records)
        return [(spec, averages.get(spec.name, 0), jobs[spec.name]) for spec in self.replayed.workers]

    def to_json(self) -> dict[str, Any]:
        """Return the object that `simulate --json` prints, in seconds and CPUs."""
        return {
            "trace": self.replayed.name,
            "scale": self.replayed.scale,
            "jobs": len(self.replayed.jobs),
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
                    "name": spec.name,
                    "cpus": cpus_number(spec.cpus),
                    "average_cpus": cpus_number(average),
                    "jobs": jobs,
                }
                for spec, average, jobs in self.workers()
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


def run(replayed: Replayed, rules: Rules, expected: str) -> Simulated:
    """Simulate a trace. `expected`: the source of expected run times, one of `SOURCES`."""
    planned = trace.plan(replayed.jobs, replayed.scale)
    submissions = [
        Submission(
            str(entry.job.row),
            round(entry.at * MS),
            max(1, round(entry.seconds * MS)),
            Request.of({CPUS: entry.job.cpus}),
            entry.job.task,
        )
        for entry in planned
    ]
    return _report(replayed, simulate(submissions, books_of(replayed.workers), rules, SOURCES[expected]()), expected)


def _report(replayed: Replayed, simulation: Simulation, expected: str) -> Simulated:
    starts = simulation.starts
    records = [Record(int(start.job), start.started / MS, start.ended / MS, start.worker) for start in starts]
    cpus = {job.row: job.cpus for job in replayed.jobs}
    work = sum(cpus[int(start.job)] * (start.ended - start.started) for start in starts)
    unhindered = max(start.submitted + start.ended - start.started for start in starts)
    return Simulated(
        replayed,
        simulation.rules,
        expected,
        records,
        [(start.started - start.submitted) / MS for start in starts],
        makespan=max(start.ended for start in starts) / MS,
        makespan_least=max(unhindered, work / sum(spec.cpus for spec in replayed.workers)) / MS,
        overruns=simulation.overruns,
        keepings=simulation.keepings,
    )
