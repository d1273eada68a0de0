"""`python -m benchmarks.steady.curve` (or `make bench-load`): latency by rate, ours beside plain Celery."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmarks.processes import SIDES
from benchmarks.report import number, significant
from benchmarks.rounds import percentile
from benchmarks.steady.drawing import svg
from benchmarks.steady.load import Load, Note, load

RESULTS = Path(__file__).with_name("curve.json")
PICTURE = Path(__file__).resolve().parents[2] / "docs" / "pictures" / "latency.svg"

#: Parts of the highest rate of a side at which its latency is measured, and seconds of each.
SHARES, SECONDS = (0.25, 0.5, 0.75, 0.9), 15.0

#: Measurements of the highest rate. The median counts.
RATES = 3


def measured(seconds: float) -> dict[str, list[dict[str, float]]]:
    """Return the points of each side. The sides take turns at each share of their own highest rates."""
    curve: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    with ExitStack() as stack:
        loads = {side: stack.enter_context(load(side)) for side in SIDES}
        rates: dict[str, list[float]] = {side: [] for side in SIDES}
        for _ in range(RATES):
            for side in SIDES:
                rates[side].append(loads[side].highest_rate())
        for share in SHARES:
            for side in SIDES:
                point = at(loads[side], share, percentile(rates[side], 0.5), seconds)
                curve[side].append(point)
                about = f"p50 {number(point['p50'])} ms, p95 {number(point['p95'])} ms"
                print(f"{share:.0%} {side}: {point['rate']:.0f} jobs/s, {about}", file=sys.stderr, flush=True)
    return curve


def at(running: Load, share: float, highest: float, seconds: float) -> dict[str, float]:
    """Return a point: latency at this share of the highest rate."""
    taken: list[float] = []

    def look(notes: list[Note]) -> None:
        taken.extend(note.milliseconds for note in notes)

    running.run(share * highest, seconds, look)
    values = {"rate": share * highest, "p50": percentile(taken, 0.5), "p95": percentile(taken, 0.95)}
    return {"share": share, **{name: significant(value) for name, value in values.items()}}


def draw(curve: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    """Write the picture of the docs."""
    PICTURE.write_text(svg(curve), encoding="utf-8")


def main(arguments: Sequence[str]) -> int:
    """Measure, write and draw; or draw what was measured before."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.steady.curve", description="Measures latency at shares of the highest rate."
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each point (default: %(default)s)")
    parser.add_argument("--draw", action="store_true", help="only draw the stored points anew")
    parser.add_argument("--json", action="store_true", help="print the points, and write nothing")
    chosen = parser.parse_args(arguments)
    if chosen.draw:
        draw(json.loads(RESULTS.read_text()))
        return 0
    curve = measured(chosen.seconds)
    text = json.dumps(curve, indent=2) + "\n"
    if chosen.json:
        sys.stdout.write(text)
        return 0
    RESULTS.write_text(text)
    draw(curve)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
