"""Packing density of jobs of different widths on workers of different sizes."""

from __future__ import annotations

import heapq
import random
import statistics
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from benchmarks.bench import Bench
from benchmarks.processes import submitter, worker
from benchmarks.rounds import Sides

#: CPUs of each worker, by name. Each has a thread per CPU, so that its slots never keep a job out.
WORKERS: Mapping[str, int] = {"small-1": 16, "small-2": 16, "large": 32}

#: Number of jobs, their least and most CPUs, and their least and most seconds.
JOBS, NARROWEST, WIDEST, SHORTEST, LONGEST = 200, 1, 16, 0.2, 2.0

#: Maximum number of rounds: a round takes about 30 s.
MOST_ROUNDS = 3


class OverCapacity(RuntimeError):
    """A worker ran more CPUs at one time than it has, so that its makespan is worthless."""


@dataclass(frozen=True)
class Job:
    """A job to pack: CPUs, and seconds for which it holds them."""

    cpus: int
    seconds: float


def jobs(draw_number: int) -> list[Job]:
    """Return the jobs of one draw, which is the same in every run.

    The draw decides how well jobs can be packed in their order of arrival: with no delay at all, the same rules give
    from 1.07 to 1.14. So every round has its own draw.
    """
    draw = random.Random(draw_number)
    return [Job(draw.randint(NARROWEST, WIDEST), draw.uniform(SHORTEST, LONGEST)) for _ in range(JOBS)]


def lower_bound(packed: Sequence[Job], cpus: int) -> float:
    """Return the seconds that no schedule of these jobs on `cpus` CPUs can beat.

    >>> lower_bound([Job(4, 1.0), Job(2, 3.0)], cpus=4)
    3.0
    >>> lower_bound([Job(4, 1.0), Job(4, 1.0)], cpus=4)
    2.0
    """
    return max(sum(job.cpus * job.seconds for job in packed) / cpus, max(job.seconds for job in packed))


def peak(ran: Sequence[tuple[float, float, int]]) -> int:
    """Return the most CPUs in use at one time, of (start, end, cpus).

    >>> peak([(0.0, 1.0, 4), (0.5, 2.0, 3), (1.0, 2.0, 4)])
    7
    """
    # At equal times an end counts before a start.
    changes = sorted([(start, cpus) for start, _, cpus in ran] + [(end, -cpus) for _, end, cpus in ran])
    most = used = 0
    for _, change in changes:
        used += change
        most = max(most, used)
    return most


def packing(bench: Bench) -> Sides:
    """Measure the makespan of the jobs divided by its lower bound.

    There is no peer: plain Celery does not know a job's CPUs and starts all jobs at once. Raises OverCapacity when a
    worker of ours did so.
    """
    return packed_draws(bench, range(min(bench.rounds, MOST_ROUNDS)))


def packed_draws(bench: Bench, draws: Iterable[int]) -> Sides:
    """Measure the makespan over its lower bound for each of these draws, in a round of its own."""
    with bench.pair() as pair, ExitStack() as stack:
        for name, cpus in WORKERS.items():
            stack.enter_context(worker("ours", pair, pool="threads", concurrency=cpus, cpus=cpus, name=name))
        sender = stack.enter_context(submitter("ours", pair))
        sides = Sides()
        rules = [without_delay(number) for number in draws]
        for number in draws:
            packed = jobs(number)
            bound = lower_bound(packed, sum(WORKERS.values()))
            requests = [(job.seconds, {"cpus": job.cpus}) for job in packed]
            ran: list[tuple[float, float, str]] = sender.call("hold", jobs=requests)
            check_capacity(packed, ran)
            makespan = max(end for _, end, _ in ran) - min(start for start, _, _ in ran)
            bench.say(f"  ours: {makespan:.1f} s, lower bound {bound:.1f} s")
            sides.ours.append(makespan / bound)
        alone = ", ".join(f"{each:.3f}" for each in rules)
        bench.profile = [f"ours, by its rules alone, without any delay: {alone}, median {statistics.median(rules):.3f}"]
        return sides


def without_delay(draw_number: int) -> float:
    """Return the makespan over its lower bound that the rules of order give if nothing takes time but the jobs.

    A job starts on the worker with the least room that suffices. A worker on which a job ended takes the first waiting
    jobs that fit.
    """
    packed, free = jobs(draw_number), dict(WORKERS)
    waiting: list[Job] = []
    running: list[tuple[float, str, int]] = []

    def start(job: Job, worker: str, now: float) -> None:
        free[worker] -= job.cpus
        heapq.heappush(running, (now + job.seconds, worker, job.cpus))

    for job in packed:
        room = [(cpus, worker) for worker, cpus in free.items() if cpus >= job.cpus]
        if room and all(other.cpus != job.cpus for other in waiting):
            start(job, min(room)[1], 0.0)
        else:
            waiting.append(job)
    now = 0.0
    while running:
        now, worker, cpus = heapq.heappop(running)
        free[worker] += cpus
        for job in list(waiting):
            if job.cpus <= free[worker]:
                waiting.remove(job)
                start(job, worker, now)
    return now / lower_bound(packed, sum(WORKERS.values()))


def check_capacity(packed: Sequence[Job], ran: Sequence[tuple[float, float, str]]) -> None:
    """Raise OverCapacity if a worker had more CPUs in use than it has, by the records of the tasks themselves."""
    by_worker: dict[str, list[tuple[float, float, int]]] = {name: [] for name in WORKERS}
    for job, (start, end, node) in zip(packed, ran, strict=True):
        by_worker[node.partition("@")[0]].append((start, end, job.cpus))
    for name, cpus in WORKERS.items():
        if (most := peak(by_worker[name])) > cpus:
            raise OverCapacity(f"{name} has {cpus} CPUs and ran {most}")
