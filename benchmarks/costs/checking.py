"""`python -m benchmarks.costs.checking`: compare the costs of a job with the stored ones, or store them (`--store`).

Commands are compared as they are. CPU time is compared as a ratio to plain Celery in the same round, which depends less
on the machine and on what else runs there. On a machine that is so busy that the rounds differ much, it is not judged.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from benchmarks.books import books
from benchmarks.costs import lives, stored
from benchmarks.costs.contender import PerJob, contender
from benchmarks.costs.measuring import run
from benchmarks.processes import SIDES
from benchmarks.report import number
from benchmarks.servers import private_pair

#: Figures whose CPU time is compared. Each spends most of it in the same way under load as on a quiet machine.
CHECKED = ("submit", "bulk", "single")

#: Kind of the ratios of CPU time.
CPU: Final = "cpu_ratio"

#: Rounds, of which the median is compared.
ROUNDS = 9

#: Greatest distance of the quartiles of the rounds, as a part of their median, at which CPU time is judged.
SPREAD = 0.15


def measured() -> dict[str, dict[str, float]]:
    """Return the costs that are compared, by kind and name. CPU times of figures that vary too much are left out."""
    with ExitStack() as stack:
        ours, plain = (stack.enter_context(contender(side, side)) for side in SIDES)
        run([ours, plain], CHECKED, ROUNDS, _say, count_calls=False)
        ratios = {}
        for figure in CHECKED:
            ratio, spread = cpu_ratio(ours.rounds[figure], plain.rounds[figure])
            if spread <= SPREAD:
                ratios[figure] = ratio
            else:
                _say(f"cpu_ratio of {figure}: not judged, because the rounds vary by {spread:.0%} on this busy machine")
        calls = {figure: each["commands"] for figure, each in ours.medians().items()}
    return {"commands": commands(), "calls": calls, CPU: ratios}


def cpu_ratio(ours: Sequence[PerJob], plain: Sequence[PerJob]) -> tuple[float, float]:
    """Return our CPU time for a job divided by plain Celery's in the same round: the median, and its spread.

    The spread is the distance of the quartiles divided by the median.
    """
    ratios = [mine["cpu_us"] / other["cpu_us"] for mine, other in zip(ours, plain, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return middle, (high - low) / middle


def commands() -> dict[str, float]:
    """Return the Redis commands of a job's life, on a ledger of its own."""
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as folder,
        private_pair(Path(folder)) as pair,
        books(pair, 0) as opened,
    ):
        return lives.commands(opened)


def compare(now: Mapping[str, Mapping[str, float]], before: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Print each cost beside the stored one. Return a line for each that grew by more than a tenth."""
    failures = []
    for kind, values in now.items():
        kept = before.get(kind, {})
        for name, value in values.items():
            print(f"{kind:10} {name:12} {number(value):>8}  stored {number(kept.get(name)):>8}")
        if kind == CPU:
            # A machine that was too busy to judge a ratio stored none. That is no fault of the machine which judges it.
            values = {name: value for name, value in values.items() if name in kept}
        failures += stored.grown(kind, values, kept)
    return failures


def to_store(now: Mapping[str, Mapping[str, float]], before: Mapping[str, Mapping[str, float]]) -> stored.Kinds:
    """Return the costs to store: those of now, and the stored CPU time of the figures that were not judged."""
    kept = {name: value for name, value in before.get(CPU, {}).items() if name in CHECKED}
    return {**now, CPU: {**kept, **now[CPU]}}


def main(arguments: Sequence[str]) -> int:
    """Compare or store. Return 1 if a cost grew by more than a tenth."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.costs.checking", description="Compares the costs of a job with the stored ones."
    )
    parser.add_argument("--store", action="store_true", help="store the costs instead")
    chosen = parser.parse_args(arguments)
    now = measured()
    if chosen.store:
        stored.write(to_store(now, stored.read()))
        _say(f"stored in {stored.STORED}")
        if missing := sorted(set(CHECKED) - set(now[CPU])):
            _say(f"CPU time was not stored for {', '.join(missing)}, because it was not judged. Try a quiet machine.")
        return 0
    failures = compare(now, stored.read())
    for line in failures:
        _say(line)
    if failures:
        _say("If the growth is worth it, store the new figures: make store-costs")
    return 1 if failures else 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
