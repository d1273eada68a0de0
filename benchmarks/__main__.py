"""`python -m benchmarks`: measure the figures and report them.

`python -m benchmarks proposals` measures the ways that were weighed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.bench import Bench
from benchmarks.figures import BY_NAME, FIGURES, Figure
from benchmarks.proposals import report as proposals
from benchmarks.report import (
    Line,
    Result,
    as_json,
    machine,
    markdown,
    print_table,
    read_profiles,
    read_results,
    update_page,
)

#: Files and page that the results go to.
RESULTS = Path(__file__).with_name("results.json")
PROFILES = Path(__file__).with_name("profiles.json")
PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference" / "benchmarks.md"

#: Rounds of a figure by default. An odd number makes the median an actual round.
ROUNDS = 5


def figures(text: str) -> list[Figure]:
    """Return the figures named in `text`, separated by commas, in the order of the table."""
    names = {name.strip() for name in text.split(",")} - {""}
    if unknown := sorted(names - set(BY_NAME)):
        known_names = ", ".join(BY_NAME)
        raise argparse.ArgumentTypeError(f"no such figure: {', '.join(unknown)} (there are {known_names})")
    return [figure for figure in FIGURES if figure.name in names]


def count(text: str) -> int:
    """Return the number of rounds in `text`, 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of rounds (1 or more)")
    return int(text)


def options(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line. On a mistake, argparse ends the process."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measures this platform beside plain Celery on the same servers, in turn.",
        epilog="Results of figures that --only leaves out stay in results.json as they are. "
        "`python -m benchmarks proposals` measures the ways that were weighed.",
    )
    parser.add_argument("--rounds", type=count, default=ROUNDS, help="rounds a figure (default: %(default)s)")
    parser.add_argument("--only", type=figures, default=[*FIGURES], metavar="FIGURE,...", help="only these")
    parser.add_argument("--json", action="store_true", help="print the results as JSON, not as a table")
    return parser.parse_args(arguments)


@dataclass
class Run:
    """Outcome of a run: results and profiles by figure, and the figures that could not be measured."""

    results: dict[str, Result] = field(default_factory=dict)
    profiles: dict[str, list[str]] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)


def measure(bench: Bench, wanted: Sequence[Figure]) -> Run:
    """Measure these figures, one after the other."""
    run = Run()
    for place, figure in enumerate(wanted, 1):
        bench.say(f"[{place}/{len(wanted)}] {figure.name}")
        bench.profile = []
        begin = time.monotonic()
        try:
            sides = figure.measure(bench)
        except Exception:  # a failing figure must not cost the others
            bench.say(traceback.format_exc())
            run.failed.append(figure.name)
        else:
            run.results[figure.name] = Result.of(figure.name, figure.unit, sides)
            run.profiles[figure.name] = bench.profile
        bench.say(f"  ({time.monotonic() - begin:.0f} s)")
    return run


def judged(results: Mapping[str, Result]) -> list[Line]:
    """Return every result beside its target, in the order of the table."""
    return [
        Line(results[figure.name], figure.target, figure.reached(results[figure.name], results))
        for figure in FIGURES
        if figure.name in results
    ]


def main(arguments: Sequence[str]) -> int:
    """Measure, write and print. Return 0, or 1 when a figure could not be measured."""
    if arguments and arguments[0] == "proposals":
        return proposals.main(arguments[1:])
    chosen = options(arguments)
    bench = Bench(chosen.rounds)
    run = measure(bench, chosen.only)
    # Figures that were not asked for keep their results. Failed figures do not.
    kept = {figure.name for figure in FIGURES} - {figure.name for figure in chosen.only}
    results = {**{name: of for name, of in read_results(RESULTS).items() if name in kept}, **run.results}
    profiles = {**{name: of for name, of in read_profiles(PROFILES).items() if name in kept}, **run.profiles}
    lines = judged(results)
    RESULTS.write_text(as_json([line.result for line in lines]))
    PROFILES.write_text(json.dumps(profiles, indent=2) + "\n")
    versions = {name: importlib.metadata.version(name) for name in ("celery", "kombu", "redis")}
    if not update_page(PAGE, markdown(lines, machine(versions | bench.versions), profiles)):
        bench.say(f"{PAGE} has no table to update")
    shown = [line for line in lines if line.result.figure in run.results]
    if chosen.json:
        sys.stdout.write(as_json([line.result for line in shown]))
    else:
        print_table(shown, sys.stdout)
        for line in shown:
            if not line.reached:
                name = line.result.figure
                print(f"\n{name} does not reach {line.target}:", *profiles[name], sep="\n")
    for name in run.failed:
        bench.say(f"{name} could not be measured; see above")
    return 1 if run.failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
