"""The figures: their names, units, families and targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks import backlog, latency, packing, registration, scripts, spending, throughput
from benchmarks.bench import Bench
from benchmarks.report import Result
from benchmarks.rounds import Sides

#: Decides if a result reaches its target. The other results of the table are there for comparison.
Reached = Callable[[Result, Mapping[str, Result]], bool]


@dataclass(frozen=True)
class Target:
    """A target in words, and what decides it."""

    text: str
    reached: Reached


@dataclass(frozen=True)
class Figure:
    """A line of the table.

    `target` is None for a figure that explains another one. `long` figures take minutes and are left out by default.
    """

    name: str
    unit: str
    measure: Callable[[Bench], Sides]
    target: Target | None = None
    long: bool = False

    @property
    def better(self) -> str:
        """Return `more` for a rate, and `less` for a cost."""
        return "more" if self.unit == "jobs/s" else "less"


def at_least(least: float) -> Target:
    """Require that ours is at least `least` times plain."""
    return Target(f"≥ {least:g} × plain", lambda result, _: result.ratio is not None and result.ratio >= least)


def at_most(most: float, peer: str = "plain") -> Target:
    """Require that ours is at most `most` times plain, or another peer that stands in plain's column."""
    return Target(f"≤ {most:g} × {peer}", lambda result, _: result.ratio is not None and result.ratio <= most)


def value_at_most(most: float, unit: str = "") -> Target:
    """Require that ours is at most `most`, in the figure's unit."""
    return Target(f"≤ {most:g} {unit}".rstrip(), lambda result, _: result.ours <= most)


def value_below(limit: float, unit: str) -> Target:
    """Require that ours is below `limit`, in the figure's unit."""
    return Target(f"< {limit:g} {unit}", lambda result, _: result.ours < limit)


def flat(other: str, growth: float, text: str) -> Target:
    """Require a ratio of at most `growth` times the ratio of the figure `other`.

    Ratios are compared, so that a machine that got slower between the two figures does not count as growth. If `other`
    was not measured, nothing is decided.
    """

    def reached(result: Result, others: Mapping[str, Result]) -> bool:
        base = others.get(other)
        if base is None or base.ratio is None:
            return True
        return result.ratio is not None and result.ratio <= growth * base.ratio

    return Target(text, reached)


FIGURES: tuple[Figure, ...] = (
    Figure("submit", "jobs/s", throughput.submit, at_least(1)),
    Figure("submit_unattended", "jobs/s", throughput.submit_unattended, at_least(1)),
    Figure("submit_behind_20000", "jobs/s", backlog.submit_behind_20000, at_least(1), long=True),
    Figure("submit_4", "jobs/s", throughput.submit_4, at_least(0.9)),
    Figure("bulk", "jobs/s", throughput.bulk, at_least(12)),
    Figure("end_to_end", "jobs/s", throughput.end_to_end, at_least(1.05)),
    Figure("drain", "jobs/s", throughput.drain, at_least(1)),
    Figure("drain_20000", "jobs/s", backlog.drain_20000, at_least(1), long=True),
    Figure("chord_1000", "jobs/s", throughput.chord, at_least(1)),
    Figure("latency_p50", "ms", latency.latency_p50, at_most(1.15)),
    Figure("latency_p95", "ms", latency.latency_p95, at_most(1.2)),
    Figure("end_to_start_p50", "ms", latency.end_to_start_p50, at_most(1.2)),
    Figure("end_to_start_p95", "ms", latency.end_to_start_p95, at_most(1.3)),
    Figure("end_to_start_two_sizes_p50", "ms", latency.end_to_start_two_sizes_p50, at_most(1.2)),
    Figure("end_to_start_two_sizes_p95", "ms", latency.end_to_start_two_sizes_p95, at_most(1.3)),
    Figure("commit_to_start_session_p95", "ms", latency.commit_to_start_session_p95, value_at_most(50, "ms")),
    Figure("commit_to_start_connection_p95", "ms", latency.commit_to_start_connection_p95, value_at_most(50, "ms")),
    Figure("packing", "× lower bound", packing.packing, value_at_most(1.06)),
    Figure("cpu_per_job", "µs", spending.cost("cpu_us"), at_most(1.05)),
    Figure("cpu_per_job_submitter", "µs", spending.cost("cpu_us.submitter")),
    Figure("cpu_per_job_worker", "µs", spending.cost("cpu_us.worker")),
    Figure("cpu_per_job_redis", "µs", spending.cost("cpu_us.Redis")),
    Figure("cpu_per_job_postgres", "µs", spending.cost("cpu_us.Postgres")),
    Figure("redis_commands_per_job", "commands", spending.cost("commands")),
    Figure("redis_scripts_per_job", "scripts", spending.cost("scripts")),
    Figure("redis_round_trips_per_job", "round trips", spending.cost("round_trips")),
    Figure("thread_switches_per_job", "switches", spending.by_process("switches")),
    Figure("system_calls_per_job", "calls", spending.by_process("system_calls")),
    Figure("waiting_job_kb", "kB", backlog.waiting_job_kb, value_at_most(1, "kB")),
    Figure("admit_vs_evalsha_3", "ms", scripts.admit_vs_evalsha_3, at_most(1.6, "EVALSHA")),
    Figure(
        "admit_vs_evalsha_10000",
        "ms",
        scripts.admit_vs_evalsha_10000,
        flat("admit_vs_evalsha_3", 1.15, "≤ 1.15 × at 3"),
    ),
    Figure(
        "admit_vs_evalsha_10000_waiting_100000",
        "ms",
        scripts.admit_vs_evalsha_10000_waiting_100000,
        flat("admit_vs_evalsha_3", 1.15, "≤ 1.15 × at 3"),
    ),
    Figure("admit_rare_queue_1000", "ms", scripts.admit_rare_queue_1000, at_most(1.3, "in the default queue")),
    Figure("read_vs_ping", "ms", scripts.read_vs_ping, at_most(1.3, "PING")),
    Figure("reads_1000_ms", "ms", scripts.reads_1000_ms, value_at_most(30, "ms")),
    Figure("register_ms", "ms", registration.register_ms, value_below(10, "ms")),
    Figure("heartbeat_ms", "ms", registration.heartbeat_ms, value_below(5, "ms")),
)

BY_NAME: Mapping[str, Figure] = {figure.name: figure for figure in FIGURES}
