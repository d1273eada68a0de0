"""Latency of one job on an idle platform, and the time that a freed slot stays empty."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.bench import Bench
from benchmarks.processes import SIDES, Side, submitter, worker
from benchmarks.rounds import Sides, percentile

#: Jobs of one round, one after the other.
JOBS = 200

#: Jobs that run before the first round.
WARM_UP = 20

#: Worker processes (prefork) of each side, and the CPUs that ours publishes for them.
CONCURRENCY = 2

#: For `end_to_start`: slots that are always full, jobs of one round, their least and greatest seconds.
SLOTS, HELD, SHORTEST, LONGEST = 4, 200, 0.02, 0.06


def latency_p50(bench: Bench) -> Sides:
    """Measure the milliseconds from a call to its result, with no other job in progress: the median."""
    ours, plain = bench.once(idle_latencies)
    return Sides([percentile(taken, 0.5) for taken in ours], [percentile(taken, 0.5) for taken in plain])


def latency_p95(bench: Bench) -> Sides:
    """Measure the milliseconds from a call to its result, as `latency_p50` does: the 95th percentile."""
    ours, plain = bench.once(idle_latencies)
    return Sides([percentile(taken, 0.95) for taken in ours], [percentile(taken, 0.95) for taken in plain])


def idle_latencies(bench: Bench) -> tuple[list[list[float]], list[list[float]]]:
    """Return the milliseconds of each call of each round, ours and plain."""
    with bench.contest(concurrency=CONCURRENCY) as contest:

        def latencies(side: Side) -> list[float]:
            with contest.metered(side, JOBS):
                taken: list[float] = contest.senders[side].call("latency", task="bench.noop", count=JOBS)
            bench.say(f"  {side}: p50 {percentile(taken, 0.5):.2f} ms, p95 {percentile(taken, 0.95):.2f} ms")
            return taken

        contest.warm_up("latency", task="bench.noop", count=WARM_UP)
        return contest.in_turn(latencies)


def end_to_start_p50(bench: Bench) -> Sides:
    """Measure the milliseconds from a task's end to the next start on the freed slot of a full worker: the median."""
    return bench.once(gaps_of_one_size).at(0.5)


def end_to_start_p95(bench: Bench) -> Sides:
    """Measure the milliseconds from a task's end to the next start on the freed slot: the 95th percentile."""
    return bench.once(gaps_of_one_size).at(0.95)


def end_to_start_two_sizes_p50(bench: Bench) -> Sides:
    """Measure the milliseconds from an end to the next start, of jobs of one and of two CPUs in turn: the median."""
    return bench.once(gaps_of_two_sizes).at(0.5)


def end_to_start_two_sizes_p95(bench: Bench) -> Sides:
    """Measure the milliseconds from an end to the next start, of two sizes in turn: the 95th percentile."""
    return bench.once(gaps_of_two_sizes).at(0.95)


@dataclass(frozen=True)
class Gaps:
    """The milliseconds of each gap of each round, of both sides."""

    ours: list[list[float]]
    plain: list[list[float]]

    def at(self, share: float) -> Sides:
        """Return a percentile of each round."""
        return Sides([percentile(gaps, share) for gaps in self.ours], [percentile(gaps, share) for gaps in self.plain])


def gaps_of_one_size(bench: Bench) -> Gaps:
    """Return the gaps between jobs that are all equal."""
    return _gaps(bench, ({},))


def gaps_of_two_sizes(bench: Bench) -> Gaps:
    """Return the gaps between jobs of one and of two CPUs in turn. Plain Celery knows no sizes."""
    return _gaps(bench, ({"cpus": 1}, {"cpus": 2}))


def held_seconds() -> list[float]:
    """Return the seconds of each job of a round, which are the same for both sides and in every run."""
    draw = random.Random(2)
    return [draw.uniform(SHORTEST, LONGEST) for _ in range(HELD)]


def _gaps(bench: Bench, sizes: Sequence[dict[str, Any]]) -> Gaps:
    """Measure how long a freed slot stays empty on a worker that always has a job for it.

    Ours publishes CPUs for the widest jobs on all slots. So the slots alone keep a job waiting, as on the plain side.
    """
    cpus = SLOTS * max(size.get("cpus", 1) for size in sizes)
    with bench.contest(concurrency=SLOTS, cpus=cpus) as contest:
        seconds = held_seconds()
        jobs: dict[Side, list[tuple[float, dict[str, Any]]]] = {
            "ours": [(each, sizes[number % len(sizes)]) for number, each in enumerate(seconds)],
            "plain": [(each, {}) for each in seconds],
        }

        def gaps(side: Side) -> list[float]:
            with contest.metered(side, HELD):
                ran: list[tuple[float, float, str]] = contest.senders[side].call("hold", jobs=jobs[side])
            idle = idle_gaps([(start, end) for start, end, _ in ran], SLOTS)
            bench.say(f"  {side}: p50 {percentile(idle, 0.5):.2f} ms, p95 {percentile(idle, 0.95):.2f} ms")
            return idle

        for side in SIDES:
            contest.senders[side].call("hold", jobs=jobs[side][: 2 * SLOTS])
        return Gaps(*contest.in_turn(gaps))


def commit_to_start_session_p95(bench: Bench) -> Sides:
    """Measure the milliseconds from the commit of a SQLAlchemy Session to the start of its job, p95."""
    return _commits(bench, "session")


def commit_to_start_connection_p95(bench: Bench) -> Sides:
    """Measure the milliseconds from the commit of a bare Connection to the start of its job, p95.

    Only a worker hears of this commit.
    """
    return _commits(bench, "connection")


def _commits(bench: Bench, by: str) -> Sides:
    """Measure one job at a time on an idle worker. Plain Celery has no counterpart."""
    with (
        bench.pair() as pair,
        worker("ours", pair, pool="threads", concurrency=CONCURRENCY, cpus=CONCURRENCY),
        submitter("ours", pair) as sender,
    ):
        sender.call("committed", by=by, count=WARM_UP)
        values = []
        for _ in range(bench.rounds):
            taken: list[float] = sender.call("committed", by=by, count=JOBS)
            bench.say(f"  p50 {percentile(taken, 0.5):.2f} ms, p95 {percentile(taken, 0.95):.2f} ms")
            values.append(percentile(taken, 0.95))
        return Sides(values)


def idle_gaps(ran: list[tuple[float, float]], slots: int) -> list[float]:
    """Return the milliseconds that each freed slot stayed empty, of jobs that kept all slots full.

    Jobs are (start, end), in seconds. The start number `slots` + n takes the slot that the n-th end frees, in any
    process.

    >>> idle_gaps([(0.0, 1.0), (0.0, 2.0), (1.5, 3.0), (2.25, 3.0)], slots=2)
    [500.0, 250.0]
    """
    starts = sorted(start for start, _ in ran)
    ends = sorted(end for _, end in ran)
    return [(start - end) * 1000 for end, start in zip(ends, starts[slots:], strict=False)]
