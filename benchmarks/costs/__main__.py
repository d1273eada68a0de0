"""`python -m benchmarks.costs`: measure the costs of a job, ours beside plain Celery and beside another checkout."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmarks.costs import report
from benchmarks.costs.contender import contender
from benchmarks.costs.measuring import FIGURES, run
from benchmarks.costs.system_calls import can_count

#: Rounds by default: with them it takes a minute.
ROUNDS = 3


def figures(text: str) -> list[str]:
    """Return the figures named in `text`, separated by commas, in the order of the table."""
    names = {name.strip() for name in text.split(",")} - {""}
    if unknown := sorted(names - set(FIGURES)):
        raise argparse.ArgumentTypeError(f"no such figure: {', '.join(unknown)} (there are {', '.join(FIGURES)})")
    return [name for name in FIGURES if name in names]


def checkout(text: str) -> Path:
    """Return the folder of a checkout with a `.venv` of its own."""
    path = Path(text)
    if not (path / ".venv" / "bin" / "python").exists() or not (path / "benchmarks").is_dir():
        raise argparse.ArgumentTypeError(f"{text} is not a checkout with a .venv and benchmarks")
    return path


def options(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line. On a mistake, argparse ends the process."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.costs",
        description="Measures what one job costs: CPU time by process, commands, round trips, switches, system calls.",
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="rounds of a figure (default: %(default)s)")
    parser.add_argument("--only", type=figures, default=[*FIGURES], metavar="FIGURE,...", help="only these")
    parser.add_argument("--beside", type=checkout, metavar="CHECKOUT", help="measure this checkout too, in turn")
    parser.add_argument("--no-plain", action="store_true", help="leave plain Celery out")
    parser.add_argument("--against", type=Path, metavar="FILE", help="compare with a file that --json wrote")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the costs to this file (- is the output)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """Measure and print."""
    chosen = options(arguments)
    with ExitStack() as stack:
        contenders = [stack.enter_context(contender("ours", "ours"))]
        if not chosen.no_plain:
            contenders.append(stack.enter_context(contender("plain", "plain")))
        if chosen.beside is not None:
            contenders.append(stack.enter_context(contender("beside", "ours", chosen.beside)))
        run(contenders, chosen.only, chosen.rounds, lambda text: print(text, file=sys.stderr, flush=True))
        costs = {each.name: each.medians() for each in contenders}
    if chosen.json == Path("-"):
        sys.stdout.write(report.as_json(costs))
        return 0
    if chosen.json is not None:
        chosen.json.write_text(report.as_json(costs))
    if chosen.against is not None:
        costs["then"] = report.read(chosen.against)["ours"]
    report.print_table(costs, chosen.only, sys.stdout)
    if not can_count():
        print("\nSystem calls were not counted: perf is not installed, or may not trace here.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
