"""`python -m benchmarks.predictions` (or `make bench-whatif`): forecasts in a replay, beside what happened.

The packaged trace is replayed on real workers, with the run times in the calls. The table goes to its place in
docs/how-to/what-if.md.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.report import machine, update_page

#: Page of the table, and its place there.
PAGE: Final = Path(__file__).resolve().parents[1] / "docs" / "how-to" / "what-if.md"
PLACE: Final = "predictions"
HEADINGS: Final = ("forecast at", "waiting", "empty in", "real", "mean wait", "real")
#: Figures of a forecast by their words, as `demo --json` has them: predicted and real.
FIGURES: Final = {"empty in": "empty_seconds", "mean wait": "wait_mean_seconds"}


def replayed(scale: str) -> list[dict[str, Any]]:
    """Replay the packaged trace on private servers, and return its forecasts."""
    options = ("--whatif", "--expected", "--json", "--scale", scale)
    command = (sys.executable, "-m", "celery", "-A", "platform", "demo", *options)
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    forecasts: list[dict[str, Any]] = json.loads(done.stdout)["forecasts"]
    return forecasts


def lines(forecasts: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Return the table without its headings: a line for each forecast."""
    return [
        (
            f"{made['at_seconds']:.1f} s",
            str(made["waiting"]),
            *(_seconds(made[figure][side]) for figure in FIGURES.values() for side in ("predicted", "real")),
        )
        for made in forecasts
    ]


def markdown(forecasts: Sequence[Mapping[str, Any]], about: str) -> str:
    """Return the table of the page, with the mean error of each figure below it."""
    rule = ("---:",) * len(HEADINGS)
    table = "\n".join("| " + " | ".join(row) + " |" for row in (HEADINGS, rule, *lines(forecasts)))
    errors = ", ".join(f"{words} {_error([made[figure] for made in forecasts])}" for words, figure in FIGURES.items())
    return f"{table}\n\nMean error: {errors}. {about}"


def _error(pairs: Sequence[Mapping[str, float | None]]) -> str:
    errors = [abs(pair["predicted"] - pair["real"]) for pair in pairs if None not in pair.values()]  # type: ignore[operator]
    return f"{sum(errors) / len(errors):.1f} s" if errors else "–"


def _seconds(seconds: float | None) -> str:
    return "never" if seconds is None else f"{seconds:.1f} s"


def main(arguments: Sequence[str]) -> int:
    """Replay, write the page, and print the table. The first argument: how many times faster than the trace."""
    scale = arguments[0] if arguments else "5000"
    versions = ", ".join(f"{name} {version}" for name, version in machine({}).items())
    text = markdown(replayed(scale), f"Scale {scale}, workers of 72 and 16 CPUs; {versions}.")
    update_page(PAGE, text, PLACE)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
