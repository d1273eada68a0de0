"""What bodies started and a dead worker left behind, and what a stopped worker still runs: processes that would go on
beside the next attempt of their job.

The processes of a pool end with their worker by themselves. What a body started (`subprocess` and the like) does not:
it is known by a variable that it inherited, and ended by whoever takes the dead life's jobs back on the same machine.
A worker that is only stopped (or hangs) still has its pool. Whoever takes its name on the same machine ends all of it
first: it is known by its pid and start.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Collection, Iterable
from typing import Final

import psutil

from celery_capacity.routing.config import process_identity
from celery_capacity.routing.config.process_identity import Place
from celery_capacity.routing.errors import NameTaken
from celery_capacity.routing.store.worker_rows import WorkerRow
from celery_capacity.workers.process.identity import is_known_dead

logger = logging.getLogger(__name__)

#: In the environment of what a worker's bodies start: the life of the worker. (No setting: nobody else sets it.)
VARIABLE: Final = "CELERY_CAPACITY_INCARNATION"
#: Seconds to wait for killed processes to be gone. (A killed process runs nothing more, though the kernel keeps it.)
GONE_WITHIN: Final = 5.0
#: Seconds between two looks at them: they are nobody's children here, so nothing tells.
LOOK_EVERY: Final = 0.01


def mark(incarnation: str) -> None:
    """From now on what this process and its pool start carries this life's name."""
    os.environ[VARIABLE] = incarnation


def see_to(row: WorkerRow | None, here: Place) -> int:
    """End what a life of a worker left on this machine, if this machine knows that it is dead; return the number of
    ended processes."""
    if row is None or not is_known_dead(row, here):
        return 0
    ended = _kill(_marked({row.incarnation}))
    if ended:
        logger.warning("%d processes that the dead worker %s had left were ended", ended, row.name)
    return ended


def end_predecessors(rows: Collection[WorkerRow], here: Place) -> int:
    """End all that former incarnations of a name still run on this machine: main processes, pools, and what bodies
    started. Return the number of ended processes. Raises `NameTaken` where one of them may not be ended."""
    rows = [row for row in rows if here.has(row.place)]
    if not rows:
        return 0
    ended = sum(_end_worker(row) for row in rows)
    ended += _kill(_marked({row.incarnation for row in rows}))
    if ended:
        names = ", ".join(sorted({row.name for row in rows}))
        logger.warning("%d processes of the former life of worker %s were ended", ended, names)
    return ended


def _end_worker(row: WorkerRow) -> int:
    """Kill a main process and all that descends from it; return how many there were."""
    if row.pid == os.getpid():
        # A worker that ran in this very process before, as tests have it: there is nothing of it to be killed.
        return 0
    try:
        main = psutil.Process(row.pid)
        if not process_identity.is_alive(row.pid, row.start_ticks):
            return 0
        # Stopped, it starts nothing that this does not see.
        main.suspend()
        return _kill([main, *main.children(recursive=True)])
    except psutil.NoSuchProcess:
        return 0
    except psutil.AccessDenied as error:
        raise NameTaken(
            f"a silent worker of the name {row.name} (pid {row.pid}) is another user's process and cannot be ended",
            value=row.name,
            advice="End that process, or give this worker another name.",
        ) from error


def _marked(incarnations: Collection[str]) -> list[psutil.Process]:
    """Return the processes that bodies of these incarnations started."""
    # A body may have started this very worker.
    spared = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    processes = []
    for process in psutil.process_iter():
        try:
            if process.pid not in spared and process.environ().get(VARIABLE) in incarnations:
                processes.append(process)
        except psutil.Error:
            continue  # it ended meanwhile, or belongs to somebody else
    return processes


def _kill(processes: Iterable[psutil.Process]) -> int:
    """Kill processes and wait until they are gone; return how many there were."""
    killed = []
    for process in processes:
        try:
            process.kill()
            killed.append(process)
        except psutil.NoSuchProcess:
            continue
    deadline = time.monotonic() + GONE_WITHIN
    while any(_runs(process) for process in killed) and time.monotonic() < deadline:
        time.sleep(LOOK_EVERY)
    return len(killed)


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False
