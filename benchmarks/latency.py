"""Latency of one job on an idle platform, and the time that a freed slot stays empty."""

from __future__ import annotations

import random
from typing import Any

from benchmarks.bench import Bench
from benchmarks.processes import Side, submitter, worker
from benchmarks.rounds import Sides, percentile

#: Jobs of one round, one after the other.
JOBS = 200

#: Jobs that run before the first round.
WARM_UP = 20

#: Worker processes (prefork) of each side, and the CPUs that ours publishes for them.
CONCURRENCY = 2

#: For `release_to_start`: slots that are always full, jobs of one round, their least and greatest seconds.
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


def release_to_start_p95(bench: Bench) -> Sides:
    """Measure the milliseconds from a task's end to the next start on the freed slot of a full worker, p95."""
    with bench.contest(concurrency=SLOTS) as contest:
        draw = random.Random(2)  # both sides, every round and every run hold for the same seconds
        jobs: list[tuple[float, dict[str, Any]]]
        jobs = [(draw.uniform(SHORTEST, LONGEST), {}) for _ in range(HELD)]

        def gap(side: Side) -> float:
            with contest.metered(side, HELD):
                ran: list[tuple[float, float, str]] = contest.senders[side].call("hold", jobs=jobs)
            gaps = idle_gaps([(start, end) for start, end, _ in ran], SLOTS)
            bench.say(f"  {side}: p50 {percentile(gaps, 0.5):.2f} ms, p95 {percentile(gaps, 0.95):.2f} ms")
            return percentile(gaps, 0.95)

        contest.warm_up("hold", jobs=jobs[:SLOTS])
        return Sides(*contest.in_turn(gap))


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
