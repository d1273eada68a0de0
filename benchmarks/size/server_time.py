"""The CPU time of Redis by its own count, and the longest of its scripts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from benchmarks.bench import Bench
from benchmarks.rounds import percentile
from celery_capacity.routing.ledger.client import Ledger

#: Fields of `INFO cpu`: the thread that carries out commands, without those that free memory or write files.
FIELDS: Final = ("used_cpu_user_main_thread", "used_cpu_sys_main_thread")
#: Microseconds from which the slow log has a script, and the entries that it keeps.
SLOW: Final = 200
ENTRIES: Final = 100_000


def main_thread_seconds(client: Any) -> float:
    """Return the seconds of CPU that the server's main thread has taken since its start."""
    usage = client.info("cpu")
    return float(sum(usage[name] for name in FIELDS))


@contextmanager
def scripts_timed(bench: Bench, ledger: Ledger, server: int) -> Iterator[Callable[[], float]]:
    """Yield a function that returns the milliseconds of the longest script since the block began, and names it.

    `server`: the pid. The slow log counts by the clock, so the server goes before all other programs meanwhile.
    """
    client: Any = ledger.client
    client.config_set("slowlog-max-len", ENTRIES)
    client.config_set("slowlog-log-slower-than", SLOW)
    client.slowlog_reset()
    names = {script.sha: name for name, script in ledger._scripts.items()}

    def longest() -> float:
        taken: dict[str, list[float]] = {}
        for entry in client.slowlog_get(ENTRIES):
            command, _, rest = entry["command"].decode("utf-8", "replace").partition(" ")
            if command.upper() == "EVALSHA":
                taken.setdefault(names.get(rest.partition(" ")[0], "?"), []).append(entry["duration"] / 1000)
        by_length = sorted(taken.items(), key=lambda script: -max(script[1]))
        for name, times in by_length[:3]:
            p99 = percentile(times, 0.99)
            bench.say(f"  {name}: {len(times)} above {SLOW / 1000} ms, p99 {p99:.2f} ms, at most {max(times):.2f} ms")
        return max(by_length[0][1]) if by_length else SLOW / 1000

    with first_of_all(bench, server):
        yield longest
    client.config_set("slowlog-log-slower-than", 1_000_000)


@contextmanager
def first_of_all(bench: Bench, server: int) -> Iterator[None]:
    """Let the main thread of a process run before all programs without such a right, where the system permits it."""
    if not hasattr(os, "sched_setscheduler"):
        yield
        return
    policy, parameters = os.sched_getscheduler(server), os.sched_getparam(server)
    try:
        os.sched_setscheduler(server, os.SCHED_FIFO, os.sched_param(1))
    except PermissionError:
        bench.say("  the slow log has also the time in which other programs had the core: no right to go before them")
        yield
        return
    try:
        yield
    finally:
        os.sched_setscheduler(server, policy, parameters)
