"""Faults of single processes: stops that outlast every lease, wrong clocks, heartbeats in pairs, twins elsewhere."""

from __future__ import annotations

import random
import signal
import sys
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import suppress
from itertools import count
from typing import Final

import psutil

from tests.faults.breaking.faults import WAYS, Way, World, empty_redis_now
from tests.faults.plan import WORKERS, Fault
from tests.fixtures.processes.platforms import READY, Process

#: Seconds by which a clock is set.
HOUR: Final = 3600.0
#: Seconds between two pairs of heartbeats.
PAIRS_EVERY: Final = 0.01
#: Jobs of a client, and seconds for the client to submit the rest of them after all faults.
CLIENT_JOBS: Final = 60
CLIENT_ENDS_WITHIN: Final = 60.0
#: Seconds between emptying Redis and stopping the workers, of which one opens the next epoch.
OPENS_WITHIN: Final = (0.0, 0.6)

_prefixes = count()


def _children(worker: Process) -> list[psutil.Process]:
    try:
        return psutil.Process(worker.pid).children(recursive=True)
    except psutil.Error:
        return []


def _send(processes: Sequence[psutil.Process], signum: signal.Signals) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signum)


def _stop_child(world: World, fault: Fault) -> Generator[None, None, None]:
    children = _children(world.workers[fault.worker])
    chosen = [random.Random(fault.chance).choice(children)] if children else []
    _send(chosen, signal.SIGSTOP)
    yield
    _send(chosen, signal.SIGCONT)


def _kill_largest(world: World, fault: Fault) -> Generator[None, None, None]:
    """Send KILL to the process with the most memory, as the kernel does when memory is used up."""
    worker = world.workers[fault.worker]
    sizes = []
    with suppress(psutil.Error):
        for process in (psutil.Process(worker.pid), *_children(worker)):
            with suppress(psutil.NoSuchProcess):
                sizes.append((process.memory_info().rss, process.pid, process))
    if sizes:
        chosen = max(sizes)[2]
        if chosen.pid == worker.pid:
            world.oracle.asked(worker)
            world.leaving[fault.worker] = time.monotonic()
        _send([chosen], signal.SIGKILL)
    yield


def _clock(seconds: float) -> Way:
    def way(world: World, fault: Fault) -> Generator[None, None, None]:
        seam = world.seams[fault.worker]
        seam.step(seconds)
        yield
        seam.step(0.0)

    return way


def _pairs(world: World, fault: Fault) -> Generator[None, None, None]:
    seam = world.seams[fault.worker]
    seam.tick(PAIRS_EVERY)
    yield
    seam.tick(0.0)


def _clone(world: World, fault: Fault) -> Generator[None, None, None]:
    """Start a worker of the same name and host name but of another boot. The platform has to refuse it."""
    lines = world.workers[fault.worker].lines
    if len(lines) == lines.maxlen or any(READY in line for line in list(lines)):
        imports = f"{world.platform.environment['PLATFORM_IMPORTS']},tests.tasks.cloned"
        twin = world.platform.worker(fault.worker, 1, "threads", ready=False, PLATFORM_IMPORTS=imports)
        world.oracle.asked(twin)
    yield


def _stop_beat(world: World, fault: Fault) -> Generator[None, None, None]:
    beat = world.beat
    if beat is not None:
        beat.signal(signal.SIGSTOP)
    yield
    if beat is not None:
        beat.signal(signal.SIGCONT)


def _stop_client(world: World, fault: Fault) -> Generator[None, None, None]:
    """Stop a program amid its submissions."""
    prefix = f"client-{next(_prefixes)}"
    arguments = [sys.executable, "-m", "tests.faults.clients.client", str(world.oracle.trace), str(CLIENT_JOBS), prefix]
    process = Process(prefix, arguments, world.platform.environment, world.platform.folder)
    world.clients[prefix] = process
    # If a store is away just now, the program prints less and is stopped all the same.
    begun = threading.Thread(target=_stop_when_begun, args=[process], daemon=True)
    begun.start()
    yield
    begun.join()
    process.signal(signal.SIGCONT)


def _stop_when_begun(process: Process) -> None:
    with suppress(AssertionError):
        process.wait_for("took 3", 5.0)
    process.signal(signal.SIGSTOP)


def account(world: World) -> None:
    """Report the accepted jobs of the run's clients to the oracle, after the clients ended."""
    for prefix, process in world.clients.items():
        process.finish(CLIENT_ENDS_WITHIN)
        tried = {int(line.split()[1]) for line in process.lines if line.startswith("try ")}
        took = {int(line.split()[1]) for line in process.lines if line.startswith("took ")}
        for number in took:
            world.oracle.accepted(f"{prefix}-{number}", number)
        for number in tried - took:
            world.oracle.unsure(f"{prefix}-{number}", number)
    world.clients.clear()


def _stop_opener(world: World, fault: Fault) -> Generator[None, None, None]:
    """Empty Redis, and stop all workers but one while a worker opens the next epoch."""
    chance = random.Random(fault.chance)
    empty_redis_now(world)
    time.sleep(chance.uniform(*OPENS_WITHIN))
    stopped = [world.workers[name] for name in chance.sample([name for name, *_ in WORKERS], len(WORKERS) - 1)]
    for worker in stopped:
        worker.signal(signal.SIGSTOP)
    yield
    for worker in stopped:
        worker.signal(signal.SIGCONT)


WAYS.update(
    {
        "stop a child for longer than each lease": _stop_child,
        "kill a worker's largest process, as if out of memory": _kill_largest,
        "set a worker's clock an hour forward": _clock(HOUR),
        "set a worker's clock an hour back": _clock(-HOUR),
        "heartbeats in pairs": _pairs,
        "start a worker's twin on another boot": _clone,
        "stop beat for longer than each lease": _stop_beat,
        "stop a client for longer than each lease": _stop_client,
        "empty Redis, and stop who opens the epoch": _stop_opener,
    }
)
