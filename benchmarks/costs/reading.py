"""Totals of processes and servers, and the part of one job in their difference.

Costs are read before and after the timed part, never inside it. The sides take turns, so that the work of shared
servers in that time belongs to the side whose turn it was.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import psycopg2
import redis

#: Number of Redis commands that a profile names, the most frequent ones.
NAMED = 12

#: Commands of a reading itself, which belong to no job.
READING = ("info", "config|resetstat", "client|setinfo", "hello", "select")

#: Redis commands that run a script.
SCRIPTS = ("eval", "evalsha", "fcall")

#: True where each process has a clock that others can read.
LINUX = sys.platform == "linux"

#: The kind of a Linux process clock that the scheduler keeps, for `clock_gettime`.
SCHEDULER_CLOCK = 2

#: Bytes of Postgres's log, and the transactions that wrote something, since the server was made.
WRITTEN = "SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn, pg_snapshot_xmax(pg_current_snapshot())::text::bigint"


@dataclass(frozen=True)
class Reading:
    """Totals since the processes and servers started.

    `cpu` is in seconds and `switches` are voluntary context switches, both by role; `calls` are Redis calls by command.
    `totals` has the counters of the servers: `script_us` and `round_trips` of Redis, `wal_bytes` and `transactions` of
    Postgres.
    """

    cpu: Counter[str] = field(default_factory=Counter)
    switches: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    totals: Counter[str] = field(default_factory=Counter)

    def since(self, earlier: Reading) -> Reading:
        """Return the difference from an earlier reading."""
        return Reading(
            _difference(self.cpu, earlier.cpu),
            _difference(self.switches, earlier.switches),
            _difference(self.calls, earlier.calls),
            _difference(self.totals, earlier.totals),
        )


@dataclass
class Costs:
    """The sum over all rounds of one side."""

    jobs: int = 0
    cpu: Counter[str] = field(default_factory=Counter)
    switches: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    totals: Counter[str] = field(default_factory=Counter)

    def add(self, reading: Reading, jobs: int) -> None:
        """Add a round of so many jobs."""
        self.jobs += jobs
        self.cpu.update(reading.cpu)
        self.switches.update(reading.switches)
        self.calls.update({name: count for name, count in reading.calls.items() if count > 0})
        self.totals.update(reading.totals)

    def per_job(self) -> dict[str, float]:
        """Return the costs of one job by name: `cpu_us`, `cpu_us.worker`, `commands`, `round_trips`, ..."""
        sums: dict[str, float] = {}
        if self.cpu:
            sums["cpu_us"] = sum(self.cpu.values()) * 1e6
            sums |= {f"cpu_us.{role}": seconds * 1e6 for role, seconds in self.cpu.items()}
        sums["commands"] = sum(self.calls.values())
        sums["scripts"] = sum(self.calls[name] for name in SCRIPTS)
        sums |= self.totals
        sums |= {f"switches.{role}": count for role, count in self.switches.items()}
        return {name: value / self.jobs for name, value in sums.items()}

    def lines(self, side: str) -> list[str]:
        """Return the profile of a side, per job, for people."""
        each = self.per_job()
        # Omit calls that round to zero per job: the idle side makes them meanwhile, and they belong to no job.
        most = [(name, count / self.jobs) for name, count in self.calls.most_common(NAMED)]
        calls = ", ".join(f"{name} {count:.1f}" for name, count in most if count >= 0.05)
        lines = [f"{side}, per job:"]
        if self.cpu:
            lines.append(f"  CPU, us: {each['cpu_us']:.0f} ({_by_role(self.cpu, self.jobs, 1e6)})")
        if self.switches:
            lines.append(f"  thread switches: {_by_role(self.switches, self.jobs)}")
        if "wal_bytes" in each:
            lines.append(f"  Postgres: {each['transactions']:.2f} transactions, {each['wal_bytes']:,.0f} bytes of log")
        took = f" that take {each['script_us']:.0f} us" if self.totals["script_us"] >= self.jobs else ""
        about = f"{each['commands']:.1f} commands, {each['round_trips']:.2f} round trips, {each['scripts']:.2f} scripts"
        return [*lines, f"  Redis: {about}{took}: {calls}"]


class Meter:
    """Reads the costs of processes by role, of Redis, and of Postgres where it has a part."""

    def __init__(
        self, client: redis.Redis, processes: Iterable[tuple[str, int]] = (), database: Any | None = None
    ) -> None:
        self._client = client
        self._processes = list(processes)
        self._database = database

    def read(self) -> Reading:
        """Return the totals now. Processes of one role are added up, with their children."""
        cpu: Counter[str] = Counter()
        switches: Counter[str] = Counter()
        for role, pid in self._processes:
            cpu[role] += cpu_seconds(pid)  # type: ignore[assignment]  # typeshed has counters of integers only
            switches[role] += thread_switches(pid)
        stats: Mapping[str, Mapping[str, int]] = self._client.info("commandstats")
        calls = Counter({name.removeprefix("cmdstat_"): int(of["calls"]) for name, of in stats.items()})
        for name in READING:
            del calls[name]
        totals: Counter[str] = Counter()
        totals["script_us"] = sum(int(of["usec"]) for name, of in stats.items() if name[len("cmdstat_") :] in SCRIPTS)
        totals["round_trips"] = int(self._client.info("stats")["total_reads_processed"])
        if self._database is not None:
            with self._database.cursor() as cursor:
                cursor.execute(WRITTEN)
                written, transactions = cursor.fetchone()
            totals.update({"wal_bytes": int(written), "transactions": int(transactions)})
        return Reading(cpu, switches, calls, totals)

    def costs(self, jobs: int, earlier: Reading) -> Costs:
        """Return the costs of so many jobs since an earlier reading."""
        costs = Costs()
        costs.add(self.read().since(earlier), jobs)
        return costs


@contextmanager
def watched(database_url: str) -> Iterator[Any]:
    """Keep a connection to Postgres open for readings, since a new one for each would cost CPU time that counts."""
    connection = psycopg2.connect(database_url.replace("postgresql+psycopg2://", "postgresql://", 1))
    connection.autocommit = True
    try:
        yield connection
    finally:
        connection.close()


def cpu_seconds(pid: int) -> float:
    """Return the CPU seconds of a process and all its children, including ended children."""
    ended = psutil.Process(pid).cpu_times()
    living = sum(_own_cpu_seconds(member) for member in family(pid))
    return float(ended.children_user + ended.children_system) + living


def _own_cpu_seconds(pid: int) -> float:
    """Return the CPU seconds of all threads of one process, or 0 if it ended and counts in its parent's sum.

    Linux has a clock of each process that is exact to the nanosecond. Elsewhere the sum comes in hundredths of seconds.
    """
    if LINUX:
        try:
            return time.clock_gettime((~pid << 3) | SCHEDULER_CLOCK)
        except OSError:
            return 0.0
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)


def family(pid: int) -> list[int]:
    """Return the pid and those of all living children."""
    return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]


def thread_switches(pid: int) -> int:
    """Return how often the threads of a process and its children waited: their voluntary context switches.

    Only living threads count. Without /proc the answer is 0.
    """
    return sum(
        int(line.split()[1])
        for member in family(pid)
        for status in Path(f"/proc/{member}/task").glob("*/status")
        for line in _lines(status)
        if line.startswith("voluntary_ctxt_switches:")
    )


def _lines(path: Path) -> list[str]:
    """Return the lines of a file; none if its thread ended."""
    try:
        return path.read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _difference(later: Counter[str], earlier: Counter[str]) -> Counter[str]:
    """Return what was added to each counter."""
    changed = Counter(later)
    changed.subtract(earlier)
    return changed


def _by_role(amounts: Mapping[str, float], jobs: int, times: float = 1) -> str:
    """Return the amounts of one job by role, such as `worker 7.1, Redis 4.0`."""
    digits = 0 if times > 1 else 1
    return ", ".join(f"{role} {amount * times / jobs:.{digits}f}" for role, amount in amounts.items())
