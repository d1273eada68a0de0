"""10,000 beating workers and a million waiting jobs of 500 shapes on one Redis, by the calls of the ledger alone.

Another Redis with two workers and an empty backlog stands beside it. Jobs are admitted and released on both in turn.
The costs are those that Redis counts itself (`INFO`), because the machine also runs the callers. A process with a
thousand connections would measure itself.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final

from benchmarks.bench import Bench
from benchmarks.books import REQUEST, Books, books
from benchmarks.rounds import percentile
from benchmarks.size.scale import Scale
from benchmarks.size.server_time import main_thread_seconds, scripts_timed
from celery_capacity.routing.inspect import overview
from celery_capacity.routing.inspect.worker_lines import WHOLE, Page
from celery_capacity.routing.recovery import workers_with_room

WORKERS: Final = 10_000
WAITING: Final = 1_000_000
SHAPES: Final = 500
#: Workers of the small cluster.
FEW: Final = 2
#: Admissions and releases of one turn, and turns of each side.
CYCLES: Final = 50
TURNS: Final = 10
#: New shapes that lack memory everywhere.
NEW_SHAPES: Final = 20
#: Seconds that a worker's heartbeats are apart (`PLATFORM_RENEW_INTERVAL`).
INTERVAL: Final = 10.0
LARGE_MEMORY: Final = 2**40
#: Workers on a page of `cluster`.
PAGE: Final = 100


def alone(bench: Bench, scale: Scale) -> dict[str, float]:
    """Measure the calls of the ledger on a large cluster, beside those on a small one."""
    workers, waiting = scale.of(WORKERS), scale.of(WAITING)
    with ExitStack() as stack:
        small_pair, pair = stack.enter_context(bench.pair()), stack.enter_context(bench.pair())
        small = stack.enter_context(books(small_pair, FEW))
        begin = time.monotonic()
        large = stack.enter_context(books(pair, workers))
        large.fill_backlog(waiting, SHAPES)
        bench.say(f"  {workers} workers and {waiting} jobs after {time.monotonic() - begin:.0f} s")
        client: Any = large.ledger.client
        beats = _cpu(client, lambda: _beat(large, workers))
        cost = _in_turn(small, large)
        with scripts_timed(bench, large.ledger, pair.redis_pid) as longest:
            with _beating(large, workers):
                for _ in range(TURNS):
                    _cycles(large)
            slowest = longest()
        new_shape = _cpu(client, lambda: _lack_memory(large)) / NEW_SHAPES
        sweep = _cpu(client, lambda: workers_with_room.fill_all(large.ledger))
        page, whole = _shown(client, Page(PAGE)), _shown(client, WHOLE)
    return {
        "size_cycle": cost[1] / cost[0],
        "size_slowest_ms": slowest,
        "size_beats_percent": 100 * beats / INTERVAL * WORKERS / workers,
        "size_new_shape_ms": new_shape * 1000,
        "size_sweep_ms": sweep * 1000,
        "size_page_ms": page * 1000,
        "size_whole_ms": whole * 1000,
    }


def _shown(client: Any, page: Page) -> float:
    """Return the seconds of this process's CPU for the JSON of the cluster."""
    begin = time.process_time()
    json.dumps(overview.from_ledger(client, page).to_json())
    return time.process_time() - begin


def _cpu(client: Any, action: Callable[[], object]) -> float:
    """Return the seconds of CPU that the server's main thread takes for an action."""
    before = main_thread_seconds(client)
    action()
    return main_thread_seconds(client) - before


def _in_turn(small: Books, large: Books) -> tuple[float, float]:
    """Return the microseconds of scripts for an admission with its release, on each side: the median of the cycles."""
    taken: dict[Books, list[float]] = {small: [], large: []}
    for turn in range(TURNS):
        for side in (small, large) if turn % 2 else (large, small):
            taken[side] += _cycles(side)
    return percentile(taken[small], 0.5), percentile(taken[large], 0.5)


def _cycles(side: Books) -> list[float]:
    """Admit and release jobs, and return the microseconds of the scripts of each cycle."""
    client: Any = side.ledger.client
    taken = []
    for _ in range(CYCLES):
        client.config_resetstat()
        job, place = side.new_job()
        side.release(job, side.ledger.submit(job, REQUEST, place, side.message))
        taken.append(float(client.info("commandstats")["cmdstat_evalsha"]["usec"]))
    return taken


def _beat(side: Books, workers: int) -> None:
    for number in range(workers):
        side.renew(f"w{number}", [])


@contextmanager
def _beating(side: Books, workers: int) -> Iterator[None]:
    """Renew the leases of all workers in a thread, each once in an interval."""
    ended = threading.Event()

    def beat() -> None:
        while True:
            for number in range(workers):
                if ended.wait(INTERVAL / workers):
                    return
                side.renew(f"w{number}", [])

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _lack_memory(side: Books) -> None:
    """Submit new shapes for which no worker has enough memory, while all CPUs are free."""
    for number in range(NEW_SHAPES):
        job, place = side.new_job()
        shape = f"cpus=1000,memory={LARGE_MEMORY + number},slots=1"
        if side.ledger.submit(job, shape, place, side.message).state != "waiting":
            raise RuntimeError("a job that lacks memory everywhere was admitted")
