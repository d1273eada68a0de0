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

from benchmarks.books import books
from benchmarks.costs import lives, stored
from benchmarks.costs.contender import PerJob, contender
from benchmarks.costs.measuring import run
from benchmarks.processes import SIDES
from benchmarks.report import number
from benchmarks.servers import private_pair

#: Figures whose CPU time is compared. Each spends most of it in the same way under load as on a quiet machine.
CHECKED = ("submit", "bulk", "single")

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
    return {"commands": commands(), "calls": calls, "cpu_ratio": ratios}


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
        failures += stored.grown(kind, values, kept)
    return failures


def main(arguments: Sequence[str]) -> int:
    """Compare or store. Return 1 if a cost grew by more than a tenth."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.costs.checking", description="Compares the costs of a job with the stored ones."
    )
    parser.add_argument("--store", action="store_true", help="store the costs instead")
    chosen = parser.parse_args(arguments)
    now = measured()
    if chosen.store:
        if missing := sorted(set(CHECKED) - set(now["cpu_ratio"])):
            _say(f"Nothing was stored, because CPU time was not judged for {', '.join(missing)}. Try a quiet machine.")
            return 1
        stored.write(now)
        _say(f"stored in {stored.STORED}")
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
