"""Wait and run times of a worker's attempts, as histograms for its own metrics.

An attempt begins when the pool gets its body, and is over when the main process hears of its end. No store is asked.
Where `PLATFORM_WORKER_METRICS` is not set there are no times, and calls return at once.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from celery_capacity.routing.model.message import ETA, HEADER, parse_tag
from celery_capacity.routing.model.states import Outcome
from celery_capacity.routing.model.token import Token
from celery_capacity.workers.process.holdings import Holding
from celery_capacity.workers.supervision import metric_names as names
from celery_capacity.workers.supervision.metric_names import BUCKETS, MAX_TASKS_OF_WORKER, OTHER, label_of

if TYPE_CHECKING:
    from celery_capacity.workers.supervision.exposition import Histogram

#: Outcomes of attempts whose bodies came to an end of their own. Others were broken off, or had not begun.
RAN: Final = frozenset({Outcome.SUCCEEDED, Outcome.FAILED, Outcome.RETRIED, Outcome.REPLACED})


class JobTimes:
    """Times of the attempts of one worker since its start. Thread-safe.

    `find`: returns the holding of an attempt, None if the worker does not hold it.
    """

    def __init__(self, find: Callable[[str, Token], Holding | None]) -> None:
        # Imported here: a worker without metrics does not import prometheus_client.
        from celery_capacity.workers.supervision.exposition import Histogram

        self._find = find
        self._new: Callable[[], Histogram] = Histogram
        self._waits = Histogram()
        self._runs: dict[str, Histogram] = {}
        #: Task of each attempt whose body is with the pool, and the time at which it went there (monotonic).
        self._begun: dict[tuple[str, Token], tuple[str, float]] = {}
        #: Re-entrant: a signal may end jobs in the main thread, whatever it is doing.
        self._lock = threading.RLock()

    def began(self, tag: str, call: Sequence[Any]) -> None:
        """Note that the pool gets a body. `call`: the arguments of Celery's trace: the task, the id, the headers."""
        parsed = parse_tag(tag)
        if parsed is None:
            return
        holding = self._find(parsed.job, parsed.token)
        wait = None if holding is None else waited(holding, call[2])
        with self._lock:
            self._begun[parsed.job, parsed.token] = str(call[0]), time.monotonic()
            if wait is not None:
                self._waits.add(bisect_left(BUCKETS, wait), 1, wait)

    def over(self, job: str, token: Token, outcome: Outcome) -> None:
        """Note that an attempt is over, for the first time."""
        now = time.monotonic()
        with self._lock:
            begun = self._begun.pop((job, token), None)
            if begun is not None and outcome in RAN:
                ran = now - begun[1]
                self._run_of(label_of(begun[0])).add(bisect_left(BUCKETS, ran), 1, ran)

    def _run_of(self, task: str) -> Histogram:
        if task not in self._runs and len(self._runs) >= MAX_TASKS_OF_WORKER:
            task = OTHER
        if task not in self._runs:
            self._runs[task] = self._new()
        return self._runs[task]

    def families(self, worker: str) -> Iterator[Any]:
        """Yield both histograms, as prometheus_client takes them."""
        from celery_capacity.workers.supervision import exposition

        runs, waits = exposition.family(names.WORKER_RUN), exposition.family(names.WORKER_WAIT)
        with self._lock:
            for task, histogram in sorted(self._runs.items()):
                histogram.put_into(runs, [task, worker])
            self._waits.put_into(waits, [worker])
        yield from (runs, waits)


def waited(holding: Holding, headers: Mapping[str, Any]) -> float | None:
    """Return the seconds for which a job waited for an attempt, None where this worker cannot know.

    A retry or a replacement without a time of its own waits since the attempt that published it, of which neither its
    message nor the ledger tells.
    """
    carried = headers.get(HEADER)
    eta = carried.get(ETA) if isinstance(carried, Mapping) else None
    if not (holding.submitted_ms and holding.admitted_ms):
        return None
    if eta is None:
        continues = headers.get("retries") or headers.get("replaced_task_nesting")
        return None if continues else max(0, holding.admitted_ms - holding.submitted_ms) / 1000
    try:
        due_ms = datetime.fromisoformat(str(eta)).timestamp() * 1000
    except (ValueError, OverflowError):
        return None
    return max(0.0, holding.admitted_ms - max(due_ms, holding.submitted_ms)) / 1000


#: Times of the workers of this process, by incarnation.
_workers: Final[dict[str, JobTimes]] = {}


def begin(incarnation: str, times: JobTimes) -> None:
    """Count the times of a worker."""
    _workers[incarnation] = times


def end(incarnation: str) -> None:
    """Count no more times of a worker that ends."""
    _workers.pop(incarnation, None)


def of(incarnation: str) -> JobTimes | None:
    """Return the times of a worker, None where it counts none."""
    return _workers.get(incarnation) if _workers else None
