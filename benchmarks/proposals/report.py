"""Report of one run: its measurements as JSON, and the tables of the page."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.bench import Bench
from benchmarks.proposals.measure import (
    CALLERS,
    MIDDLE,
    NAMES,
    ROWS,
    SIZES,
    Death,
    Latency,
    Loss,
    deaths,
    growth,
    latencies,
    losses,
)
from benchmarks.report import machine, number, update_page

RESULTS = Path(__file__).with_name("results.json")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "RESOURCE_OPTIMIZATION_PROPOSALS.md"
#: Calls of each question to each way at each size.
CALLS = 200

#: The questions, in the words of the tables.
QUESTIONS = {
    "taken": "How much is taken in all?",
    "free": "How much is free on each worker?",
    "admit": "Admit one job",
}


@dataclass(frozen=True)
class Report:
    """Results of one run. `about`: date, machine and versions."""

    about: str
    latencies: list[Latency]
    growth: list[Latency]
    deaths: list[Death]
    losses: list[Loss]

    def as_json(self) -> str:
        """Return the text of results.json: times in milliseconds, ages in seconds, CPUs as counts."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Report:
        fields: dict[str, Any] = json.loads(text)
        return cls(
            fields["about"],
            [Latency(**line) for line in fields["latencies"]],
            [Latency(**line) for line in fields["growth"]],
            [Death(**line) for line in fields["deaths"]],
            [Loss(**line) for line in fields["losses"]],
        )

    def tables(self) -> dict[str, str]:
        """Return the tables of the page, by the name of their place there."""
        return {
            "latency": "\n\n".join([self.about, *map(self._question, QUESTIONS)]),
            "callers": self._at_once(),
            "rows": self._rows(),
            "death": self._deaths(),
            "loss": self._losses(),
        }

    def _question(self, question: str) -> str:
        heads = [f"{workers:,} workers" for workers in SIZES]
        return _table(
            [f"{QUESTIONS[question]} (ms, p50 / p95)", *heads],
            [[name, *(self._cell(name, question, workers, 1) for workers in SIZES)] for name in NAMES],
        )

    def _cell(self, way: str, question: str, workers: int, callers: int) -> str:
        def is_it(one: Latency) -> bool:
            return (one.way, one.question, one.workers, one.callers) == (way, question, workers, callers)

        return _times(next(latency for latency in self.latencies if is_it(latency)))

    def _at_once(self) -> str:
        rows = [[name, *(self._cell(name, "admit", MIDDLE, callers) for callers in (1, CALLERS))] for name in NAMES]
        return _table([f"Admit one job, {MIDDLE} workers (ms, p50 / p95)", "one caller", f"{CALLERS} callers"], rows)

    def _rows(self) -> str:
        names = list(dict.fromkeys(latency.way for latency in self.growth))
        lines = []
        for question in QUESTIONS:
            for name in names:
                by_rows = {
                    latency.rows: latency
                    for latency in self.growth
                    if (latency.way, latency.question) == (name, question)
                }
                lines.append([f"{QUESTIONS[question]} ({name})", *(_times(by_rows[rows]) for rows in ROWS)])
        return _table([f"{MIDDLE} workers (ms, p50 / p95)", *(f"{rows:,} rows" for rows in ROWS)], lines)

    def _deaths(self) -> str:
        def seconds(found: float | None, watched: float) -> str:
            return f"still after {watched:g} s" if found is None else f"{found:.2f} s"

        rows = [
            [death.way, seconds(death.counted, death.watched), seconds(death.held, death.watched)]
            for death in self.deaths
        ]
        ttl = self.deaths[0].ttl
        return _table([f"A worker dies (lease of {ttl:g} s)", "its capacity is counted", "its jobs are held"], rows)

    def _losses(self) -> str:
        rows = [
            [loss.way, str(loss.at_once), f"{loss.running} of {loss.cpus}", number(loss.running / loss.cpus)]
            for loss in self.losses
        ]
        heads = ["The quick store is emptied", "jobs admitted at once", "CPUs that run in the end", "ratio"]
        return _table(heads, rows)


def _times(one: Latency) -> str:
    return f"{number(one.p50)} / {number(one.p95)}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def run(bench: Bench, calls: int) -> Report:
    """Measure everything on one pair of servers."""
    with bench.pair() as pair:
        report = Report(
            "",
            latencies(pair, calls, bench.say),
            [],
            deaths(pair, bench.say),
            losses(pair, bench.say),
        )
        grown = growth(pair, bench.say)  # last: it leaves a million rows behind
    versions = {name: importlib.metadata.version(name) for name in ("redis", "psycopg2-binary")}
    about = ", ".join(f"{name} {version}" for name, version in machine(versions | bench.versions).items())
    today = datetime.now(UTC).date().isoformat()
    return Report(f"Measured on {today}: {about}.", report.latencies, grown, report.deaths, report.losses)


def calls(argument: str) -> int:
    """Return the number of calls in `argument`, 20 or more: a p95 of fewer calls has no meaning."""
    if not argument.isdecimal() or int(argument) < 20:
        raise argparse.ArgumentTypeError(f"{argument!r} is not a number of calls (20 or more)")
    return int(argument)


def main(arguments: Sequence[str], write: Callable[[str], object] = sys.stdout.write) -> int:
    """Measure, write results.json and the tables of the page, and print. Return 0 or 1.

    Runs as `python -m benchmarks proposals`. The result is 1 if the page has no place for a table.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks proposals",
        description="Measures the ways that were weighed beside the platform, on small stand-ins; about a minute.",
    )
    parser.add_argument("--calls", type=calls, default=CALLS, help="calls of each question (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the results as JSON, not as tables")
    chosen = parser.parse_args(arguments)
    bench = Bench(rounds=1)
    report = run(bench, chosen.calls)
    RESULTS.write_text(report.as_json())
    tables = report.tables()
    missing = [name for name, table in tables.items() if not update_page(PAGE, table, f"proposals-{name}")]
    write(report.as_json() if chosen.json else "\n\n".join(tables.values()) + "\n")
    for name in missing:
        bench.say(f"{PAGE} has no table proposals-{name} to update")
    return 1 if missing else 0
