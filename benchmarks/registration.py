"""Cost for a worker to register and to renew its lease, among 1,000 workers."""

from __future__ import annotations

from benchmarks.bench import Bench
from benchmarks.books import books
from benchmarks.rounds import Sides, percentile
from benchmarks.scripts import milliseconds

#: Workers that are registered already.
WORKERS = 1000

#: Calls in one round.
CALLS = 200

#: Running jobs of the worker whose heartbeat is measured: each heartbeat names them.
HELD = 16


def register_ms(bench: Bench) -> Sides:
    """Measure the registration of one more worker, in milliseconds (p50)."""
    with bench.pair() as pair, books(pair, WORKERS) as opened:

        def register() -> float:
            taken = milliseconds(lambda: opened.register("newcomer"))
            opened.leave("newcomer")
            return taken

        sides = Sides()
        for _ in range(bench.rounds):
            sides.ours.append(percentile([register() for _ in range(CALLS)], 0.5))
            bench.say(f"  ours: {sides.ours[-1]:.2f} ms")
        return sides


def heartbeat_ms(bench: Bench) -> Sides:
    """Measure one heartbeat of a worker that runs jobs, in milliseconds (p50)."""
    with bench.pair() as pair, books(pair, WORKERS) as opened:
        holder, holds = opened.run_jobs(HELD)
        sides = Sides()
        for _ in range(bench.rounds):
            taken = [milliseconds(lambda: opened.renew(holder, holds)) for _ in range(CALLS)]
            sides.ours.append(percentile(taken, 0.5))
            bench.say(f"  ours: {sides.ours[-1]:.2f} ms")
        return sides
