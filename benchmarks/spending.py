"""Costs of a job from its submission to its result: CPU time by process, calls of Redis, switches, system calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from io import StringIO

from benchmarks.bench import Bench
from benchmarks.costs.contender import Contender, PerJob, contender
from benchmarks.costs.measuring import run
from benchmarks.costs.report import print_table
from benchmarks.processes import SIDES
from benchmarks.rounds import Sides

#: The figure of the costs that the lines of the table are made of.
MEASURED = "end_to_end"

#: Rounds of both sides: the costs of a job in each.
Spent = Mapping[str, Sequence[PerJob]]


def cost(*names: str) -> Callable[[Bench], Sides]:
    """Return a function that measures the sum of some costs of a job, such as `cpu_us.worker`."""

    def measure(bench: Bench) -> Sides:
        spent = bench.once(end_to_end)
        sums = {side: [sum(each.get(name, 0.0) for name in names) for each in rounds] for side, rounds in spent.items()}
        return Sides(sums["ours"], sums["plain"])

    return measure


def by_process(kind: str) -> Callable[[Bench], Sides]:
    """Return a function that measures a cost of a job that is counted by process, over all processes."""
    return cost(*(f"{kind}.{role}" for role in ("submitter", "worker", "Redis", "Postgres")))


def end_to_end(bench: Bench) -> Spent:
    """Return the costs of a job of each round, by side. The system calls are those of a single round."""
    with ExitStack() as stack:
        sides = [stack.enter_context(contender(side, side)) for side in SIDES]
        run(sides, [MEASURED], bench.rounds, lambda text: bench.say(f"  {text}"))
        text = StringIO()
        print_table({each.name: each.medians() for each in sides}, [MEASURED], text)
        bench.profile = text.getvalue().strip().splitlines()
        return {each.name: _rounds(each) for each in sides}


def _rounds(side: Contender) -> list[PerJob]:
    """Return the costs of each round, with the system calls where they could be counted."""
    return [each | side.calls.get(MEASURED, {}) for each in side.rounds[MEASURED]]
