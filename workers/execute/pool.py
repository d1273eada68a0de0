"""Celery's pools: how large they are, which of their jobs have not started, and how one is left with running bodies."""

from __future__ import annotations

import logging
import os
import sys
import threading
from contextlib import suppress
from functools import partial
from inspect import GEN_CREATED, getgeneratorstate
from typing import Any, Final

from celery.concurrency.base import BasePool
from celery.concurrency.solo import TaskPool as SoloPool

#: Seconds for the last lines of the log, and of the output.
_FLUSH_WITHIN: Final = 1.0


def slots_of(worker: Any) -> int:
    """Return the number of jobs that the pool of a worker runs at once.

    A pool that grows by itself (`--autoscale`) counts with its largest size: it grows as jobs come.
    """
    scaler = getattr(worker, "autoscaler", None)
    return int(scaler.max_concurrency if scaler is not None else worker.pool.num_processes)


def runs_in_loop(pool: Any) -> bool:
    """Return True for a pool whose bodies run in the main loop, or may make it wait for a place in the pool."""
    return bool(getattr(pool, "is_green", False)) or isinstance(pool, SoloPool)


def recall_unsent(pool: Any) -> set[str]:
    """Take the jobs out of a prefork pool that were sent to no process yet, and return their ids.

    A half-written job is written to its end, since the process at the other side reads it. Other pools start jobs at
    once: nothing to recall. Celery's own `flush` also gives up running jobs that have not said so yet: their ends would
    never be heard of.
    """
    inner = getattr(pool, "_pool", None)
    buffer = getattr(inner, "outbound_buffer", None)
    if inner is None or buffer is None:
        return set()
    recalled = set()
    while buffer:
        job = buffer.popleft()
        job.discard()
        recalled.add(job.correlation_id)
    owned = {writer: job for job in inner._cache.values() if (writer := _writer_of(job)) is not None}
    for generator in list(inner._active_writers):
        job = owned.get(generator)
        if job is None:
            continue
        if getgeneratorstate(generator) == GEN_CREATED:
            job.discard()
            recalled.add(job.correlation_id)
            inner._active_writers.discard(generator)
        elif job._write_to._is_alive():
            inner._flush_writer(job._write_to, generator)
    return recalled


def breaks_off(pool: Any) -> bool:
    """Return True for a pool that can break off a single body: it has processes, or greenlets."""
    return getattr(pool.terminate_job, "__func__", None) is not BasePool.terminate_job


def abandon_bodies(pool: Any) -> bool:
    """Give up the bodies of a pool that cannot break them off. Return False for a pool that can.

    A pool of threads waits for its bodies when it stops. From now on it does not, and its process ends without them
    (`end_process`). The `solo` pool has its body in the main thread, which an exception leaves.
    """
    if breaks_off(pool):
        return False
    pool.platform_abandoned = True
    if (executor := getattr(pool, "executor", None)) is not None:
        pool.on_stop = partial(executor.shutdown, wait=False, cancel_futures=True)
    return True


def abandoned(pool: Any) -> bool:
    return getattr(pool, "platform_abandoned", False)


def end_process(worker: Any, code: int) -> None:
    """End the process at once, if bodies still run in threads of it: Python would wait for them.

    Their jobs have been handed back before. The log and the output are flushed by a thread that gets a second: such a
    body may hold the lock of a handler or of a stream for ever.
    """
    if getattr(worker.pool, "executor", None) is None:
        return
    if worker.pidlock:
        worker.pidlock.release()
    flushing = threading.Thread(target=_flush_output, name="flush", daemon=True)
    # The system may have no thread for us: then the last lines are lost.
    with suppress(RuntimeError):
        flushing.start()
        flushing.join(_FLUSH_WITHIN)
    os._exit(code)


def _flush_output() -> None:
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads it, or it is closed
            stream.flush()


def _writer_of(job: Any) -> Any:
    reference = getattr(job, "_writer", None)
    return reference() if reference is not None else None
