"""The figures: their names, units, families and targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks import latency, packing, registration, scripts, throughput
from benchmarks.bench import Bench
from benchmarks.report import Result
from benchmarks.rounds import Sides

#: Decides if a result reaches its target. The other results of the table are there for comparison.
Reached = Callable[[Result, Mapping[str, Result]], bool]


@dataclass(frozen=True)
class Figure:
    """A line of the table. `target` says in words what `reached` decides."""

    name: str
    unit: str
    measure: Callable[[Bench], Sides]
    target: str
    reached: Reached


def ratio_at_least(least: float) -> Reached:
    """Require that ours is at least `least` times plain."""
    return lambda result, _: result.ratio is not None and result.ratio >= least


def bulk_at_least(least: float, times: float) -> Reached:
    """Require that ours is at least `least`, in the figure's unit, and at least `times` times plain."""
    return lambda result, _: result.ours >= least and result.ratio is not None and result.ratio >= times


def ratio_at_most(most: float) -> Reached:
    """Require that ours is at most `most` times plain."""
    return lambda result, _: result.ratio is not None and result.ratio <= most


def value_at_most(most: float) -> Reached:
    """Require that ours is at most `most`, in the figure's unit."""
    return lambda result, _: result.ours <= most


def value_below(limit: float) -> Reached:
    """Require that ours is below `limit`, in the figure's unit."""
    return lambda result, _: result.ours < limit


def flat(other: str, growth: float, most: float) -> Reached:
    """Require a ratio to plain of at most `most`, and of at most `growth` times the ratio of the figure `other`.

    Ratios are compared, so that a machine that got slower between the two figures does not count as growth. If `other`
    was not measured, only the first condition is decided.
    """

    def reached(result: Result, others: Mapping[str, Result]) -> bool:
        if result.ratio is None or result.ratio > most:
            return False
        base = others.get(other)
        return base is None or base.ratio is None or result.ratio <= growth * base.ratio

    return reached


FIGURES: tuple[Figure, ...] = (
    Figure("submit", "jobs/s", throughput.submit, "≥ 0.75 × plain", ratio_at_least(0.75)),
    Figure("submit_4", "jobs/s", throughput.submit_4, "≥ 0.9 × plain", ratio_at_least(0.9)),
    Figure("end_to_end", "jobs/s", throughput.end_to_end, "≥ 0.8 × plain", ratio_at_least(0.8)),
    Figure("bulk", "jobs/s", throughput.bulk, "≥ 8,000 and 5 × a plain group", bulk_at_least(8000, 5)),
    Figure("chord_1000", "jobs/s", throughput.chord, "≥ 0.8 × plain", ratio_at_least(0.8)),
    Figure("drain", "jobs/s", throughput.drain, "≥ 0.75 × plain", ratio_at_least(0.75)),
    Figure("latency_p50", "ms", latency.latency_p50, "≤ 1.5 × plain", ratio_at_most(1.5)),
    Figure("latency_p95", "ms", latency.latency_p95, "≤ 1.5 × plain", ratio_at_most(1.5)),
    Figure("release_to_start_p95", "ms", latency.release_to_start_p95, "≤ 10 ms", value_at_most(10)),
    Figure(
        "commit_to_start_session_p95",
        "ms",
        latency.commit_to_start_session_p95,
        "≤ 50 ms",
        value_at_most(50),
    ),
    Figure(
        "commit_to_start_connection_p95",
        "ms",
        latency.commit_to_start_connection_p95,
        "≤ 50 ms",
        value_at_most(50),
    ),
    Figure("packing", "× lower bound", packing.packing, "≤ 1.12", value_at_most(1.12)),
    Figure("admit_vs_evalsha_3", "ms", scripts.admit_vs_evalsha_3, "≤ 2 × EVALSHA", ratio_at_most(2)),
    Figure(
        "admit_vs_evalsha_10000",
        "ms",
        scripts.admit_vs_evalsha_10000,
        "≤ 2 × EVALSHA, ≤ 1.3 × at 3",
        flat("admit_vs_evalsha_3", growth=1.3, most=2),
    ),
    Figure(
        "admit_vs_evalsha_10000_waiting_100000",
        "ms",
        scripts.admit_vs_evalsha_10000_waiting_100000,
        "≤ 2 × EVALSHA, ≤ 1.3 × at 3",
        flat("admit_vs_evalsha_3", growth=1.3, most=2),
    ),
    Figure(
        "admit_rare_queue_1000",
        "ms",
        scripts.admit_rare_queue_1000,
        "≤ 1.3 × in the default queue",
        ratio_at_most(1.3),
    ),
    Figure("read_vs_ping", "ms", scripts.read_vs_ping, "≤ 1.3 × PING", ratio_at_most(1.3)),
    Figure("reads_1000_ms", "ms", scripts.reads_1000_ms, "≤ 30 ms", value_at_most(30)),
    Figure("register_ms", "ms", registration.register_ms, "< 10 ms", value_below(10)),
    Figure("heartbeat_ms", "ms", registration.heartbeat_ms, "< 5 ms", value_below(5)),
)

BY_NAME: Mapping[str, Figure] = {figure.name: figure for figure in FIGURES}
