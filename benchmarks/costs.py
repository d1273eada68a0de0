"""Reasons for a figure: the cost of one job in each process, and its calls of Redis.

Costs are read before and after the timed part, never inside it. The sides take turns, so that the work of the shared
servers in that time belongs to the side whose turn it was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import psutil
import redis

#: Number of Redis commands that a profile names, the most frequent ones.
NAMED = 12


@dataclass(frozen=True)
class Reading:
    """Totals since the processes started: CPU seconds by role, and Redis calls by command.

    `script_us` is the time that Redis spent in scripts, in microseconds.
    """

    cpu: Counter[str]
    calls: Counter[str]
    script_us: int

    def since(self, earlier: Reading) -> Reading:
        """Return the difference from an earlier reading."""
        cpu, calls = Counter(self.cpu), Counter(self.calls)
        cpu.subtract(earlier.cpu)
        calls.subtract(earlier.calls)
        return Reading(cpu, calls, self.script_us - earlier.script_us)


@dataclass
class Costs:
    """The sum over all rounds of one side."""

    jobs: int = 0
    cpu: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    script_us: int = 0

    def add(self, reading: Reading, jobs: int) -> None:
        """Add a round of so many jobs."""
        self.jobs += jobs
        self.cpu.update(reading.cpu)
        self.calls.update({name: count for name, count in reading.calls.items() if count > 0})
        self.script_us += reading.script_us

    def lines(self, side: str) -> list[str]:
        """Return the profile of a side, per job, for people."""
        cpu = ", ".join(f"{role} {seconds / self.jobs * 1e6:.0f}" for role, seconds in self.cpu.items())
        # Omit calls that round to zero per job: the idle side makes them meanwhile, and they belong to no job.
        most = [(name, count / self.jobs) for name, count in self.calls.most_common(NAMED)]
        calls = ", ".join(f"{name} {each:.1f}" for name, each in most if each >= 0.05)
        processes = [f"  CPU, us: {cpu}"] if cpu else []
        scripts = f", scripts take {self.script_us / self.jobs:.0f} us" if self.script_us >= self.jobs else ""
        return [f"{side}, per job:", *processes, f"  Redis calls{scripts}: {calls}"]


def read(client: redis.Redis, processes: Iterable[tuple[str, int]]) -> Reading:
    """Return the totals now, of processes (role, pid) and their children. Processes of a role are added up."""
    stats: dict[str, dict[str, int]] = client.info("commandstats")
    calls = Counter({name.removeprefix("cmdstat_"): int(of["calls"]) for name, of in stats.items()})
    del calls["info"]  # our own call
    scripts = sum(int(stats[name]["usec"]) for name in ("cmdstat_eval", "cmdstat_evalsha") if name in stats)
    cpu: dict[str, float] = {}
    for role, pid in processes:
        cpu[role] = cpu.get(role, 0.0) + cpu_seconds(pid)
    return Reading(Counter(cpu), calls, scripts)


def cpu_seconds(pid: int) -> float:
    """Return the CPU seconds of a process and all its children, including ended children."""
    process = psutil.Process(pid)
    times = process.cpu_times()
    ended: float = times.children_user + times.children_system
    return float(times.user + times.system) + ended + sum(living(process.children(recursive=True)))


def living(processes: Iterable[psutil.Process]) -> Iterable[float]:
    """Yield the CPU seconds of each process that still exists."""
    for process in processes:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue  # the process ended since it was listed, and counts in its parent's sum from now on
        yield float(times.user + times.system)
