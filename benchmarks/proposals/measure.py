"""The measurements: latency at three sizes, callers at once, a table that grows, a worker that died, a lost store."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.books import apart
from benchmarks.proposals.cache import Cache
from benchmarks.proposals.columns import Columns
from benchmarks.proposals.counts import FileCounts
from benchmarks.proposals.registration import Registration
from benchmarks.proposals.sums import Sums
from benchmarks.proposals.way import ASKED, CPUS, Cluster, Held, Way
from benchmarks.rounds import percentile
from benchmarks.scripts import milliseconds
from benchmarks.servers import Pair

#: Names of the ways in the tables.
FILE, SUMS, INDEXED, COLUMNS, CACHE, PLATFORM = NAMES = (
    "file",
    "database sums",
    "database sums, indexed",
    "database columns",
    "cache alone",
    "registration and heartbeat",
)

#: Function that shows progress to the waiting user.
Say = Callable[[str], None]

#: Workers of the three sizes.
SIZES: Final = (3, 100, 1000)
#: Of so many calls, one asks for the free CPUs of each worker: with 1,000 workers that is a long answer.
FREE_EVERY: Final = 4
#: Number of workers when callers come at once, and when the table grows.
MIDDLE: Final = 100
#: Callers at once, and admissions of each.
CALLERS, EACH = 8, 25
#: Rows of the table that grows, and calls at each size.
ROWS: Final = (10_000, 100_000, 1_000_000)
ROW_CALLS: Final = 30
#: Seconds of a lease, and until its jobs are taken back, for a dying worker: a thirtieth of the usual 60 and 75.
TTL, LOST_AFTER = 2.0, 2.5
#: Leases for which a dead worker is watched.
WATCHED: Final = 3


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one call. `question`: taken, free or admit. `callers`: number of callers at once."""

    way: str
    question: str
    workers: int
    rows: int
    callers: int
    p50: float
    p95: float


@dataclass(frozen=True)
class Death:
    """Three workers, one of which falls silent: seconds until it is not counted, and until its jobs are released.

    None: it was still counted, or its jobs were still held, when the watch ended. `watched` and `ttl` are seconds.
    """

    way: str
    counted: float | None
    held: float | None
    watched: float
    ttl: float


@dataclass(frozen=True)
class Loss:
    """Three workers, half of whose CPUs are taken, after the quick store was emptied.

    `at_once`: jobs that were admitted before any repair. `running`: CPUs of all jobs that run when nothing more is
    admitted. `cpus`: CPUs of the workers.
    """

    way: str
    at_once: int
    running: int
    cpus: int


@contextmanager
def ways(
    pair: Pair, names: tuple[str, ...] = NAMES, ttl: float = 3600, lost_after: float = 3700
) -> Iterator[dict[str, Way]]:
    """Make these ways on one pair of servers, in their order. None is loaded.

    `ttl`, `lost_after`: see `Registration`.
    """
    other = pair.plain_url
    make: dict[str, Callable[[], Way]] = {
        FILE: lambda: FileCounts(Path(pair.folder) / "counts.json"),
        SUMS: lambda: Sums(pair.database_url, indexed=False),
        INDEXED: lambda: Sums(pair.database_url, indexed=True),
        COLUMNS: lambda: Columns(pair.database_url),
        CACHE: lambda: Cache(other),
        PLATFORM: lambda: Registration(pair.redis_url, pair.database_url, ttl=ttl, lost_after=lost_after),
    }
    with ExitStack() as stack:
        made: dict[str, Way] = {}
        for name in names:
            made[name] = make[name]()
            stack.callback(made[name].close)
        yield made


def latencies(pair: Pair, calls: int, say: Say) -> list[Latency]:
    """Ask each way each question, call by call in turn, at each size.

    At the middle size, many callers also ask at once.
    """
    results: list[Latency] = []
    for workers in SIZES:
        cluster = Cluster(workers)
        with ways(pair) as asked:
            for way in asked.values():
                way.load(cluster)
            with apart(pair.redis_pid):
                results += _in_turn(asked, cluster, calls)
            if workers == MIDDLE:
                results += _at_once(asked, cluster)
        say(f"  {workers} workers")
    return results


def _in_turn(asked: Mapping[str, Way], cluster: Cluster, calls: int) -> list[Latency]:
    times: dict[tuple[str, str], list[float]] = {}
    shuffle = random.Random(4).shuffle
    for call in range(-max(1, calls // 10), calls):
        order = list(asked)
        shuffle(order)  # the first way after a pause meets a sleeping server
        for name in order:
            way = asked[name]
            way.taken()
            of_this_call = {"taken": milliseconds(way.taken)}
            if call % FREE_EVERY == 0:
                of_this_call["free"] = milliseconds(way.free)
            of_this_call["admit"], held = _admit(way)
            way.release(held)
            if call >= 0:  # before, connections and caches get warm
                for question, taken in of_this_call.items():
                    times.setdefault((name, question), []).append(taken)
    return [_latency(name, question, cluster, 1, values) for (name, question), values in times.items()]


def _at_once(asked: Mapping[str, Way], cluster: Cluster) -> list[Latency]:
    return [
        _latency(name, "admit", cluster, CALLERS, _admit_at_once(way, CALLERS, EACH)) for name, way in asked.items()
    ]


def _admit_at_once(way: Way, callers: int, each: int) -> list[float]:
    """Return the milliseconds of the admissions of so many callers.

    Each caller releases its job before it asks again.
    """

    def ask(handle: Way) -> list[float]:
        times = []
        for _ in range(each):
            taken, held = _admit(handle)
            handle.release(held)
            times.append(taken)
        return times

    handles = [way.apart() for _ in range(callers)]
    try:
        for handle in handles:
            handle.release(_admit(handle)[1])
        with ThreadPoolExecutor(callers) as threads:
            return [taken for times in threads.map(ask, handles) for taken in times]
    finally:
        for handle in handles:
            handle.close()


def _admit(way: Way) -> tuple[float, Held]:
    answers: list[Held | None] = []
    taken = milliseconds(lambda: answers.append(way.admit()))
    held = answers[0]
    if held is None:
        raise RuntimeError("a job that fits was refused")
    return taken, held


def _latency(way: str, question: str, cluster: Cluster, callers: int, times: list[float]) -> Latency:
    p50, p95 = (round(percentile(times, share), 4) for share in (0.5, 0.95))
    return Latency(way, question, cluster.workers, cluster.rows, callers, p50, p95)


def growth(pair: Pair, say: Say) -> list[Latency]:
    """Measure the sums over a table that grows, with its index and without."""
    results = []
    for name in (SUMS, INDEXED):
        for rows in ROWS:
            cluster = Cluster(MIDDLE, rows)
            with ways(pair, (name,)) as asked:
                asked[name].load(cluster)
                results += _in_turn(asked, cluster, ROW_CALLS)
            say(f"  {name}, {rows} rows")
    return results


def deaths(pair: Pair, say: Say) -> list[Death]:
    """Let one of three workers, half full, fall silent. Watch all ways in the same loop."""
    cluster, watched = Cluster(3), WATCHED * TTL
    dead = next(name for name, held in cluster.held.items() if 0 < held < CPUS)
    live = [name for name in cluster.names if name != dead]
    counted: dict[str, float] = {}
    given_back: dict[str, float] = {}
    with ways(pair, ttl=TTL, lost_after=LOST_AFTER) as asked:
        for way in asked.values():
            way.load(cluster)
            for worker in cluster.names:
                way.beat(worker)
        pause, begin = threading.Event(), time.monotonic()
        while (passed := time.monotonic() - begin) < watched:
            for name, way in asked.items():
                for worker in live:
                    way.beat(worker)
                way.watch()
                free = way.free()
                if dead not in free:
                    counted.setdefault(name, round(passed, 2))
                # Its jobs run elsewhere when they take the room of the live workers.
                if sum(free[worker] for worker in live) <= CPUS - cluster.held[dead]:
                    given_back.setdefault(name, round(passed, 2))
            pause.wait(0.05)
    say("  a worker that died")
    return [Death(name, counted.get(name), given_back.get(name), watched, TTL) for name in NAMES]


def losses(pair: Pair, say: Say) -> list[Loss]:
    """Empty the quick store of each way while half of the CPUs are taken, then admit jobs until none is admitted."""
    cluster = Cluster(3)
    results = []
    with ways(pair) as asked:
        for name, way in asked.items():
            way.load(cluster)
            way.empty()
            at_once = _admit_all(way)
            jobs = cluster.running + at_once + way.recover() + _admit_all(way)
            results.append(Loss(name, at_once, jobs * ASKED, cluster.workers * CPUS))
    say("  a store that was emptied")
    return results


def _admit_all(way: Way) -> int:
    """Admit until nothing more is admitted. Return the number of admitted jobs."""
    admitted = 0
    while way.admit() is not None:
        admitted += 1
    return admitted
