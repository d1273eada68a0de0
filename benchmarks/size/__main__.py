"""`python -m benchmarks.size`: measure the platform at the size of a large cluster and report it."""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
import time
import traceback
from collections.abc import Sequence

from benchmarks.bench import Bench
from benchmarks.report import update_page
from benchmarks.size.drawing import draw
from benchmarks.size.figures import PARTS
from benchmarks.size.report import HEADINGS, PAGE, PLACE, RESULTS, Report
from benchmarks.size.scale import Scale

#: Default number of rounds. The table shows the worst.
ROUNDS = 2


def parts(text: str) -> list[str]:
    """Return the parts named in `text`, separated by commas, in the order of the table."""
    names = {name.strip() for name in text.split(",")} - {""}
    if unknown := sorted(names - set(PARTS)):
        raise argparse.ArgumentTypeError(f"no such part: {', '.join(unknown)} (there are {', '.join(PARTS)})")
    return [name for name in PARTS if name in names]


def options(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line. On a mistake, argparse ends the process."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.size",
        description="Measures the platform with a million waiting jobs, 10,000 workers and a million finished rows.",
        epilog="What --only leaves out stays in results.json as it is. A --scale below 1 is a try: nothing is written.",
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="rounds of each part (default: %(default)s)")
    parser.add_argument("--only", type=parts, default=[*PARTS], metavar="PART,...", help="only these")
    parser.add_argument("--scale", type=float, default=1.0, help="sizes, beside those of the table (default: 1)")
    parser.add_argument("--pages", action="store_true", help="measure nothing: write the page from the stored results")
    return parser.parse_args(arguments)


def write_page(bench: Bench, report: Report) -> None:
    """Write the table and the picture of the docs."""
    if not update_page(PAGE, report.markdown(), PLACE):
        bench.say(f"{PAGE} has no table to update")
    draw(report)


def main(arguments: Sequence[str]) -> int:
    """Measure, write and print. Return 0, or 1 when a part could not be measured or a target was missed."""
    chosen = options(arguments)
    bench, scale = Bench(chosen.rounds), Scale(chosen.scale)
    if chosen.pages:
        write_page(bench, Report.read())
        return 0
    values: dict[str, list[float]] = {}
    failed: list[str] = []
    for round_ in range(chosen.rounds):
        for name in chosen.only:
            bench.say(f"[round {round_ + 1} of {chosen.rounds}] {name}")
            begin = time.monotonic()
            try:
                measured = PARTS[name].measure(bench, scale)
            except Exception:  # a failing part must not cost the others
                bench.say(traceback.format_exc())
                failed.append(name)
                continue
            for figure, value in measured.items():
                values.setdefault(figure, []).append(value)
            bench.say(f"  ({time.monotonic() - begin:.0f} s)")
    versions = {name: importlib.metadata.version(name) for name in ("celery", "redis")}
    report = Report.of(values, versions | bench.versions)
    if scale.part == 1:
        whole = report.over(Report.read())
        RESULTS.write_text(whole.as_json())
        write_page(bench, whole)
    for row in (HEADINGS, *report.lines()):
        print("  ".join(row))
    for missed in report.missed():
        bench.say(f"{missed.name} does not reach its target")
    return 1 if failed or (report.missed() and scale.part == 1) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
