"""A module for a worker: commands that return its threads, and the threads that a job passed.

A step of a job is noted in the thread that makes it. Two steps in different threads are a hand-off between them.
"""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from typing import Any

from celery.worker.control import inspect_command

from celery_capacity.routing import os_threads
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.store import refused_transitions
from celery_capacity.workers.execute.request import JobRequest
from celery_capacity.workers.results.outcome_writer import Recorder
from celery_capacity.workers.settle.settle_thread import LedgerThread

#: Steps of each job as (step, thread), in their order.
_steps: dict[str, list[tuple[str, str]]] = defaultdict(list)


def _noted(owner: Any, name: str, jobs_of: Callable[..., list[str]]) -> None:
    """Have the calls of a function noted as a step of these jobs."""
    function = getattr(owner, name)

    @wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        for job in jobs_of(*arguments, **options):
            _steps[job].append((name, threading.current_thread().name))
        return function(*arguments, **options)

    setattr(owner, name, call)


_noted(LedgerThread, "arrive", lambda _, tag, *__: [tag.job])
_noted(LedgerThread, "end", lambda _, job, *__, **___: [job])
_noted(JobRequest, "execute_using_pool", lambda request, *_, **__: [request.id])
_noted(Recorder, "add", lambda _, transitions: [transition.job for transition in transitions])
_noted(refused_transitions, "write", lambda _, __, batch, **___: [transition.job for transition in batch])
_noted(
    Ledger,
    "prepare_settle",
    lambda *_, ended=(), arrived=(), **__: [*(end.job for end in ended), *(arrival[0] for arrival in arrived)],
)


def own_threads() -> set[int]:
    """Return the system's numbers of all threads of this process but the main one."""
    return {int(task) for task in os.listdir("/proc/self/task")} - {os.getpid()}


@inspect_command()
def threads(_: Any) -> dict[str, Any]:
    """Return the number of threads beside the main thread, and the names of those that have one."""
    names = sorted(thread.name for thread in threading.enumerate() if isinstance(thread, os_threads.Thread))
    return {"count": len(own_threads()), "names": names}


@inspect_command(args=[("job", str)])
def steps(_: Any, job: str) -> list[tuple[str, str]]:
    """Return the steps of a job in this process, each with its thread."""
    return list(_steps[job])
