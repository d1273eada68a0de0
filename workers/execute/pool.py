"""Facts about Celery's pools: how large they are, and which jobs were given to them and have not started."""

from __future__ import annotations

from inspect import GEN_CREATED, getgeneratorstate
from typing import Any


def slots_of(worker: Any) -> int:
    """Return the number of jobs that the pool of a worker runs at once.

    A pool that grows by itself (`--autoscale`) counts with its largest size: it grows as jobs come.
    """
    scaler = getattr(worker, "autoscaler", None)
    return int(scaler.max_concurrency if scaler is not None else worker.pool.num_processes)


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


def _writer_of(job: Any) -> Any:
    reference = getattr(job, "_writer", None)
    return reference() if reference is not None else None
