"""`python -m benchmarks.steady.soak` (or `make soak`): half an hour at 80 % of this machine's rate, and the verdict.

Memory, latency and disk of the minute after a warm-up are compared with those of the last minute.
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

#: Greatest change of a memory, and greatest growth of the latency and of the live tables.
MEMORY, LATENCY, TABLES = 0.05, 1.2, 1.5

#: Seconds between two samples of the memory.
SAMPLE_SECONDS = 5.0

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
        warm, length = self.seconds * WARM_UP, self.seconds * PERIOD
        return (warm, warm + length), (self.seconds - length, self.seconds)

    def verdicts(self) -> list[Verdict]:
        """Return a verdict for each memory, the latency and the size of the tables."""
        first, last = self.periods()
        verdicts = []
        for name in self.samples[0].sizes:
            before, after = self._mean(name, first), self._mean(name, last)
            change = after / before
            held = change <= TABLES if name == "tables" else abs(change - 1) <= MEMORY
            limit = f"≤ {TABLES:g} ×" if name == "tables" else f"± {MEMORY:.0%}"
            verdicts.append(Verdict(name, "MB", before / 1e6, after / 1e6, limit, held))
        before, after = self._p95(first), self._p95(last)
        verdicts.append(Verdict("latency p95", "ms", before, after, f"≤ {LATENCY:g} ×", after <= LATENCY * before))
        return verdicts

    def _mean(self, name: str, period: tuple[float, float]) -> float:
        begin, end = period
        inside = [sample.sizes[name] for sample in self.samples if begin <= sample.second <= end]
        middle = (begin + end) / 2
        nearest = min(self.samples, key=lambda sample: abs(sample.second - middle))
        return statistics.mean(inside or [nearest.sizes[name]])

    def _p95(self, period: tuple[float, float]) -> float:
        begin, end = period
        return percentile([taken for due, taken in self.latencies if begin <= due <= end], 0.95)


@dataclass(frozen=True)
class Verdict:
    """A value in the period after the warm-up and in the last one, and if it stayed within its limit."""

    name: str
    unit: str
    after_warm_up: float
    at_the_end: float
    limit: str
    held: bool

    def line(self) -> str:
        change = self.at_the_end / self.after_warm_up
        numbers = f"{number(self.after_warm_up):>8} {number(self.at_the_end):>8} {self.unit:3} {change:6.3f} ×"
        return f"{self.name:14} {numbers}  {self.limit:8} {'held' if self.held else 'NOT HELD'}"


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
                due = now + min(SAMPLE_SECONDS, seconds * PERIOD / 2)
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
    parser.add_argument("--seconds", type=float, default=SECONDS, help="how long (default: %(default)s)")
    parser.add_argument("--share", type=float, default=SHARE, help="part of the highest rate (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the verdicts and samples as JSON")
    chosen = parser.parse_args(arguments)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"))
    console = Console(stderr=True)
    with load("ours", SETTINGS) as running, Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        highest = running.highest_rate()
        rate = chosen.share * highest
        soaked = soak(running, rate, chosen.seconds, progress)
    verdicts = soaked.verdicts()
    if chosen.json:
        about = {"highest_rate": significant(highest), "rate": significant(rate), "seconds": chosen.seconds}
        of = {"verdicts": [asdict(verdict) for verdict in verdicts], "samples": [asdict(s) for s in soaked.samples]}
        print(json.dumps({**about, "jobs": len(soaked.latencies), **of}, indent=2))
    else:
        jobs = f"{len(soaked.latencies):,} jobs in {chosen.seconds:,.0f} s"
        print(f"{jobs}, {rate:.0f} a second: {chosen.share:.0%} of the highest rate, {highest:.0f}")
        print(f"{'':14} {'warm':>8} {'end':>8}")
        for verdict in verdicts:
            print(verdict.line())
    return 0 if all(verdict.held for verdict in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
