"""Orphans of dead and stopped workers: processes that would go on beside the next attempt of their job.

The processes of a pool end with their worker by themselves. A process that a body started (`subprocess` and the like)
does not end. It is known by a variable that it inherited. The worker that takes the dead incarnation's jobs back on the
same machine ends it.

A worker that is only stopped, or hangs, still has its pool. Such a worker is known by its pid and start. The next
worker that takes its name on the same machine ends all of its processes first.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Collection, Iterable
from typing import Final

import psutil

from celery_capacity.routing.config import process_identity
from celery_capacity.routing.config.process_identity import PidSpace
from celery_capacity.routing.errors import NameTaken
from celery_capacity.routing.store.worker_rows import WorkerRow
from celery_capacity.workers.process.identity import is_known_dead

logger = logging.getLogger(__name__)

#: Variable in the environment of processes that bodies start: the incarnation of the worker. It is no setting: nobody
#: else sets it.
VARIABLE: Final = "CELERY_CAPACITY_INCARNATION"
#: Seconds to wait for killed processes to be gone. A killed process runs nothing more, though the kernel keeps it.
GONE_TIMEOUT: Final = 5.0
#: Seconds between two looks at killed processes: they are not children of this process, so nothing signals their end.
LOOK_EVERY: Final = 0.01


def mark(incarnation: str) -> None:
    """Mark all processes that this process and its pool start from now on with this incarnation of the worker."""
    os.environ[VARIABLE] = incarnation


def see_to(row: WorkerRow | None, pid_space: PidSpace) -> int:
    """End the processes that an incarnation of a worker left on this machine; return how many.

    Nothing is ended unless this machine knows that the incarnation is over.
    """
    if row is None or not is_known_dead(row, pid_space):
        return 0
    ended = _kill(_marked({row.incarnation}))
    if ended:
        logger.warning("%d processes that the dead worker %s had left were ended", ended, row.name)
    return ended


def end_predecessors(rows: Collection[WorkerRow], pid_space: PidSpace) -> int:
    """End all processes that former incarnations of a name still run on this machine; return how many.

    These are main processes, pools, and processes that bodies started. Raises `NameTaken` where a process may not be
    ended.
    """
    rows = [row for row in rows if pid_space.has(row.pid_space)]
    if not rows:
        return 0
    ended = sum(_end_worker(row) for row in rows)
    ended += _kill(_marked({row.incarnation for row in rows}))
    if ended:
        names = ", ".join(sorted({row.name for row in rows}))
        logger.warning("%d processes of the former incarnation of worker %s were ended", ended, names)
    return ended


def _end_worker(row: WorkerRow) -> int:
    """Kill a main process and all its descendants; return how many there were."""
    if row.pid == os.getpid():
        # The worker ran in this very process before, as in tests: nothing of it is to be killed.
        return 0
    try:
        main = psutil.Process(row.pid)
        if not process_identity.is_alive(row.pid, row.start_ticks):
            return 0
        # A suspended process starts no child that this would miss.
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
            continue  # the process ended meanwhile, or belongs to somebody else
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
    deadline = time.monotonic() + GONE_TIMEOUT
    while any(_runs(process) for process in killed) and time.monotonic() < deadline:
        time.sleep(LOOK_EVERY)
    return len(killed)


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False
