"""`python -m benchmarks.steady.soak` (or `make soak`): half an hour at 80 % of this machine's rate, and the verdict.

Memory, latency and disk of the minute after a warm-up are compared with those of the last minute. Only growth breaks a
limit. Each compared value is a median, so that one pause or one sample decides nothing.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import redis
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.costs.reading import family, watched
from benchmarks.report import number, significant
from benchmarks.rounds import percentile
from benchmarks.steady.load import Load, Note, load

#: Seconds of a soak, and the part of the measured rate at which jobs arrive.
SECONDS, SHARE = 1800.0, 0.8

#: Parts of the whole that the warm-up takes, and each of the compared periods: five minutes and one, of thirty.
WARM_UP, PERIOD = 1 / 6, 1 / 30

#: A short run has longer periods: a minute, but no more than this part of the whole.
SHORT_PERIOD_SECONDS, SHORT_PERIOD = 60.0, 1 / 10

#: Greatest growth of a memory, of the latency's p95 and of the live tables, as factors.
MEMORY, LATENCY, TABLES = 1.05, 1.2, 1.5

#: Most seconds between two samples of the memory, and least number of samples in a compared period.
SAMPLE_SECONDS, SAMPLES = 5.0, 6

#: Equal parts of a period of which each has a p95 of its own. Their median counts.
SLICES = 6

#: Finished jobs move into the archive soon, so that the live tables reach their size within the warm-up.
SETTINGS = {"PLATFORM_KEEP_FINISHED": "20", "PLATFORM_SWEEP_INTERVAL": "5"}

#: Bytes of the tables and indexes of live jobs: the archive grows on purpose.
LIVE = """
SELECT sum(pg_total_relation_size(oid))::bigint FROM pg_class
WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace AND relname NOT LIKE '%archive%'
"""


@dataclass(frozen=True)
class Sample:
    """Bytes at a moment of the run, in seconds since it began: memory by process, `tables` on disk."""

    second: float
    sizes: Mapping[str, int]


@dataclass
class Soaked:
    """The samples and latencies of a run of so many seconds."""

    seconds: float
    samples: list[Sample] = field(default_factory=list)
    #: The second at which each job was due, and its milliseconds.
    latencies: list[tuple[float, float]] = field(default_factory=list)

    def periods(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Return begin and end of the first compared period and of the last."""
        warm, length = self.seconds * WARM_UP, period_seconds(self.seconds)
        return (warm, warm + length), (self.seconds - length, self.seconds)

    def verdicts(self) -> list[Verdict]:
        """Return a verdict for each memory, the latency and the size of the tables."""
        first, last = self.periods()
        verdicts = []
        for name in self.samples[0].sizes:
            before, after = self._median(name, first), self._median(name, last)
            verdicts.append(Verdict(name, "MB", before / 1e6, after / 1e6, TABLES if name == "tables" else MEMORY))
        verdicts.append(Verdict("latency p95", "ms", self._p95(first), self._p95(last), LATENCY))
        return verdicts

    def _median(self, name: str, period: tuple[float, float]) -> float:
        """Return the median of a size in a period, or the sample that is nearest to the middle of it."""
        begin, end = period
        inside = [sample.sizes[name] for sample in self.samples if begin <= sample.second <= end]
        middle = (begin + end) / 2
        nearest = min(self.samples, key=lambda sample: abs(sample.second - middle))
        return statistics.median(inside or [nearest.sizes[name]])

    def _p95(self, period: tuple[float, float]) -> float:
        """Return the median of the p95 of the slices of a period."""
        begin, end = period
        slices: list[list[float]] = [[] for _ in range(SLICES)]
        for due, taken in self.latencies:
            if begin <= due <= end:
                slices[min(SLICES - 1, int((due - begin) / (end - begin) * SLICES))].append(taken)
        return statistics.median(percentile(taken, 0.95) for taken in slices if taken)


def period_seconds(seconds: float) -> float:
    """Return the length of each compared period of a run: a minute of half an hour."""
    return max(seconds * PERIOD, min(SHORT_PERIOD_SECONDS, seconds * SHORT_PERIOD))


@dataclass(frozen=True)
class Verdict:
    """A value in the period after the warm-up and in the last one. `most`: the greatest allowed growth, as a factor."""

    name: str
    unit: str
    after_warm_up: float
    at_the_end: float
    most: float

    @property
    def change(self) -> float:
        """Return how many times the first value the last one is."""
        return self.at_the_end / self.after_warm_up

    @property
    def held(self) -> bool:
        """Return True if the value did not grow beyond its limit. A fall is no leak."""
        return self.change <= self.most

    @property
    def fell(self) -> bool:
        """Return True if the value fell by more than it may grow."""
        return self.change * self.most < 1

    def line(self) -> str:
        """Return the verdict as a line of the table."""
        numbers = f"{number(self.after_warm_up):>8} {number(self.at_the_end):>8} {self.unit:3} {self.change:6.3f} ×"
        verdict = "NOT HELD" if not self.held else "held, and fell" if self.fell else "held"
        return f"{self.name:14} {numbers}  ≤ {self.most:<4g} × {verdict}"

    def as_json(self) -> dict[str, Any]:
        """Return the verdict as JSON."""
        return asdict(self) | {"change": significant(self.change), "held": self.held, "fell": self.fell}


def soak(running: Load, rate: float, seconds: float, progress: Progress) -> Soaked:
    """Submit at the rate for so long, and sample memory, disk and latency meanwhile."""
    soaked = Soaked(seconds)
    bar = progress.add_task(f"{rate:.0f} jobs/s", total=seconds)
    begin = time.monotonic()
    with redis.Redis.from_url(running.pair.redis_url) as client, watched(running.pair.database_url) as database:
        due = 0.0

        def look(notes: list[Note]) -> None:
            nonlocal due
            now = time.monotonic() - begin
            soaked.latencies += [(note.due - begin, note.milliseconds) for note in notes]
            if now >= due:
                soaked.samples.append(Sample(now, sizes(running, client, database)))
                due = now + min(SAMPLE_SECONDS, period_seconds(seconds) / SAMPLES)
            progress.update(bar, completed=min(now, seconds))

        running.run(rate, seconds, look)
    return soaked


def sizes(running: Load, client: redis.Redis, database: Any) -> dict[str, int]:
    """Return the bytes of memory of each part, and of the live tables on disk."""
    with database.cursor() as cursor:
        cursor.execute(LIVE)
        (tables,) = cursor.fetchone()
    return {
        "submitter": memory(running.sender.pid),
        "worker": memory(running.worker.pid),
        "Redis": int(client.info("memory")["used_memory"]),
        "Postgres": memory(running.pair.postgres_pid),
        "tables": int(tables),
    }


def memory(pid: int) -> int:
    """Return the bytes of a process and its children. Memory that several share counts once (Pss).

    Shared segments are left out: Postgres's buffers have a fixed size, and count only as far as they were used.
    """
    total = 0
    for member in family(pid):
        try:
            rollup = Path(f"/proc/{member}/smaps_rollup").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended since it was listed
        sizes = {name: int(size) for name, size in re.findall(r"^(\w+): +(\d+) kB", rollup, re.MULTILINE)}
        total += (sizes["Pss"] - sizes.get("Pss_Shmem", 0)) * 1024
    return total


def main(arguments: Sequence[str]) -> int:
    """Soak and print the verdicts. Return 1 if a limit was not held."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.steady.soak", description="Runs the platform under a steady load, and judges it."
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, help="how long; all periods are scaled")
    length.add_argument("--seconds", type=float, default=SECONDS, help="how long (default: %(default)s)")
    parser.add_argument("--share", type=float, default=SHARE, help="part of the highest rate (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the verdicts and samples as JSON")
    chosen = parser.parse_args(arguments)
    seconds = chosen.seconds if chosen.minutes is None else 60 * chosen.minutes
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"))
    console = Console(stderr=True)
    with load("ours", SETTINGS) as running, Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        highest = running.highest_rate()
        rate = chosen.share * highest
        soaked = soak(running, rate, seconds, progress)
    verdicts = soaked.verdicts()
    if chosen.json:
        about = {"highest_rate": significant(highest), "rate": significant(rate), "seconds": seconds}
        of = {"verdicts": [verdict.as_json() for verdict in verdicts], "samples": [asdict(s) for s in soaked.samples]}
        print(json.dumps({**about, "jobs": len(soaked.latencies), **of}, indent=2))
    else:
        jobs = f"{len(soaked.latencies):,} jobs in {seconds:,.0f} s"
        print(f"{jobs}, {rate:.0f} a second: {chosen.share:.0%} of the highest rate, {highest:.0f}")
        print(f"{'':14} {'warm':>8} {'end':>8}")
        for verdict in verdicts:
            print(verdict.line())
    return 0 if all(verdict.held for verdict in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
