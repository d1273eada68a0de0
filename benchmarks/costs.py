"""Why a figure is what it is: what one job costs each process, and what it asks of Redis.

Read before and after the timed part, never inside it. The sides take turns, so what the shared servers did
meanwhile belongs to the side whose turn it was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import psutil
import redis

#: Commands of Redis that a profile names, the ones that are called most.
NAMED = 12


@dataclass(frozen=True)
class Reading:
    """Totals since the processes started: CPU seconds by role, and Redis calls by command.

    `script_us` is the microseconds that Redis spent in scripts.
    """

    cpu: Counter[str]
    calls: Counter[str]
    script_us: int

    def since(self, earlier: Reading) -> Reading:
        """What was added to an earlier reading."""
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
        """One more round of so many jobs."""
        self.jobs += jobs
        self.cpu.update(reading.cpu)
        self.calls.update({name: count for name, count in reading.calls.items() if count > 0})
        self.script_us += reading.script_us

    def lines(self, side: str) -> list[str]:
        """The profile of a side, per job, for people."""
        cpu = ", ".join(f"{role} {seconds / self.jobs * 1e6:.0f}" for role, seconds in self.cpu.items())
        # What rounds to nothing belongs to no job: it is what the idle side does meanwhile.
        most = [(name, count / self.jobs) for name, count in self.calls.most_common(NAMED)]
        calls = ", ".join(f"{name} {each:.1f}" for name, each in most if each >= 0.05)
        processes = [f"  CPU, us: {cpu}"] if cpu else []
        scripts = f", scripts take {self.script_us / self.jobs:.0f} us" if self.script_us >= self.jobs else ""
        return [f"{side}, per job:", *processes, f"  Redis calls{scripts}: {calls}"]


def read(client: redis.Redis, processes: Iterable[tuple[str, int]]) -> Reading:
    """The totals now, of processes (role, pid) and their children; those of one role are added up."""
    stats: dict[str, dict[str, int]] = client.info("commandstats")
    calls = Counter({name.removeprefix("cmdstat_"): int(of["calls"]) for name, of in stats.items()})
    del calls["info"]  # our own
    scripts = sum(int(stats[name]["usec"]) for name in ("cmdstat_eval", "cmdstat_evalsha") if name in stats)
    cpu: dict[str, float] = {}
    for role, pid in processes:
        cpu[role] = cpu.get(role, 0.0) + cpu_seconds(pid)
    return Reading(Counter(cpu), calls, scripts)


def cpu_seconds(pid: int) -> float:
    """CPU seconds of a process and all its children, those that ended included."""
    process = psutil.Process(pid)
    own = process.cpu_times()
    ended: float = own.children_user + own.children_system
    return float(own.user + own.system) + ended + sum(living(process.children(recursive=True)))


def living(processes: Iterable[psutil.Process]) -> Iterable[float]:
    """CPU seconds of each process that still is there."""
    for process in processes:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue  # it ended since it was listed, and is in its parent's sum from now on
        yield float(times.user + times.system)
