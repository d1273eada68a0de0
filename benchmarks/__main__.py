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
    SIZING,
    Line,
    Result,
    about_on,
    as_json,
    explained,
    headline,
    machine,
    markdown,
    measured_on,
    print_table,
    read_profiles,
    read_results,
    sizing,
    update_page,
)

#: Files and page that the results go to.
RESULTS = Path(__file__).with_name("results.json")
PROFILES = Path(__file__).with_name("profiles.json")
DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = DOCS / "reference" / "benchmarks.md"
SIZING_PAGE = DOCS / "how-to" / "sizing.md"

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
        epilog="Results of figures that are left out stay in results.json as they are. "
        "`python -m benchmarks proposals` measures the ways that were weighed.",
    )
    parser.add_argument("--rounds", type=count, default=ROUNDS, help="rounds a figure (default: %(default)s)")
    parser.add_argument("--only", type=figures, metavar="FIGURE,...", help="only these, long ones too")
    parser.add_argument("--long", action="store_true", help="also those that take minutes: a backlog of 20,000")
    parser.add_argument("--json", action="store_true", help="print the results as JSON, not as a table")
    parser.add_argument("--pages", action="store_true", help="measure nothing: write the pages from the stored results")
    chosen = parser.parse_args(arguments)
    if chosen.only is None:
        chosen.only = [figure for figure in FIGURES if chosen.long or not figure.long]
    return chosen


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
    lines = []
    for figure in FIGURES:
        result = results.get(figure.name)
        if result is not None:
            target = figure.target
            reached = None if target is None else target.reached(result, results)
            lines.append(Line(result, figure.better, "–" if target is None else target.text, reached))
    return lines


def write_pages(bench: Bench, results: Mapping[str, Result], profiles: Mapping[str, list[str]], about: str) -> None:
    """Write the tables of the docs. `about`: when and where they were measured."""
    if not update_page(PAGE, markdown(judged(results), about, profiles)):
        bench.say(f"{PAGE} has no table to update")
    if set(SIZING) <= set(results) and not update_page(SIZING_PAGE, sizing(results), "sizing"):
        bench.say(f"{SIZING_PAGE} has no table to update")


def main(arguments: Sequence[str]) -> int:
    """Measure, write and print. Return 0, or 1 when a figure could not be measured."""
    if arguments and arguments[0] == "proposals":
        return proposals.main(arguments[1:])
    chosen = options(arguments)
    bench = Bench(chosen.rounds)
    if chosen.pages:
        write_pages(bench, read_results(RESULTS), read_profiles(PROFILES), about_on(PAGE))
        return 0
    run = measure(bench, chosen.only)
    # Figures that were not asked for keep their results. Failed figures do not.
    kept = {figure.name for figure in FIGURES} - {figure.name for figure in chosen.only}
    results = {**{name: of for name, of in read_results(RESULTS).items() if name in kept}, **run.results}
    profiles = {**{name: of for name, of in read_profiles(PROFILES).items() if name in kept}, **run.profiles}
    lines = judged(results)
    versions = {name: importlib.metadata.version(name) for name in ("celery", "kombu", "redis")}
    write_pages(bench, results, profiles, measured_on(machine(versions | bench.versions)))
    RESULTS.write_text(as_json([line.result for line in lines]))
    PROFILES.write_text(json.dumps(profiles, indent=2) + "\n")
    shown = [line for line in lines if line.result.figure in run.results]
    if chosen.json:
        sys.stdout.write(as_json([line.result for line in shown]))
    else:
        print_table(shown, sys.stdout)
        for about, profile in explained(shown, profiles):
            print("", f"{', '.join(map(headline, about))}:", *profile, sep="\n")
    for name in run.failed:
        bench.say(f"{name} could not be measured; see above")
    return 1 if run.failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
