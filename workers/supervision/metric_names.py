"""Metrics for Prometheus: names, labels and meanings, which the dashboard, the workers and the documents share."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

#: Bounds of the buckets in which waits and run times are counted (seconds): from admissions at once to a day.
BUCKETS: Final = (0.01, 0.05, 0.25, 1.0, 5.0, 30.0, 120.0, 600.0, 3600.0, 14_400.0, 86_400.0)
#: Value of a label for what has no series of its own: a shape, a task.
OTHER: Final = "other"
#: Tasks with series of their own.
MAX_TASKS: Final = 200
#: Characters of the value of a label.
MAX_LABEL: Final = 200


class Kind(Enum):
    """Type of a metric, as Prometheus calls it."""

    GAUGE = "gauge"
    COUNTER = "counter"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class MetricName:
    """Name of a metric as queries write it, its type, its labels and its meaning.

    `worker`: True if a worker serves it too.
    """

    name: str
    kind: Kind
    labels: tuple[str, ...]
    meaning: str
    worker: bool = False


def _gauge(name: str, labels: str, meaning: str, worker: bool = False) -> MetricName:
    return MetricName(f"platform_{name}", Kind.GAUGE, tuple(labels.split()), meaning, worker)


def _counter(name: str, labels: str, meaning: str) -> MetricName:
    return MetricName(f"platform_{name}_total", Kind.COUNTER, tuple(labels.split()), meaning)


def _histogram(name: str, labels: str, meaning: str) -> MetricName:
    return MetricName(f"platform_{name}", Kind.HISTOGRAM, tuple(labels.split()), meaning)


CAPACITY: Final = _gauge(
    "resource_capacity", "resource worker", "capacity of a live worker: CPUs, bytes of memory, counts", True
)
ALLOCATED: Final = _gauge("resource_allocated", "resource worker", "allocated amount of a live worker", True)
HEARTBEAT_AGE: Final = _gauge("heartbeat_age_seconds", "worker", "seconds since the last heartbeat of a worker", True)
AUTHORITY: Final = _gauge("authority", "store", "1 for the store that decides, ledger or postgres; else 0", True)
EPOCH: Final = _gauge("epoch", "", "epoch of the authority, which grows with each opening of the ledger", True)
RUN: Final = _histogram("run_seconds", "task", "seconds from the start of a job's body to its end")
WAIT: Final = _histogram("wait_seconds", "", "seconds from the time a job was submitted or due to its admission")
JOBS: Final = _gauge("jobs", "state", "jobs in each state that is not final")
ENDED: Final = _counter("jobs_ended", "state", "jobs that ended, by their final state")
BACKLOG: Final = _gauge("backlog", "shape", "waiting jobs of the largest shapes; the others in one sum")
OLDEST: Final = _gauge("oldest_waiting_seconds", "", "seconds for which the oldest job waits")
BLOCKED: Final = _gauge("blocked_jobs", "", "waiting jobs that no live worker takes, not even an empty one")
REFUSALS: Final = _counter("refusals", "reason", "actions that did not happen, and messages that were set aside")
FENCED: Final = _counter("fenced_writes", "", "writes that were refused, since their attempt no longer held its job")
DRIFT: Final = _gauge("ledger_drift", "", "differences between both stores since the ledger's counters began")
LOSSES: Final = _counter("lost_attempts", "", "attempts that were lost with their worker or process")
DUTIES: Final = _counter("duty_passes", "duty result", "passes of the duties")
UNAPPLIED: Final = _gauge("unapplied_transitions", "", "transitions that Postgres does not have yet")
UNAPPLIED_AGE: Final = _gauge("unapplied_seconds", "", "seconds since the oldest of these was noted")
QUARANTINED: Final = _counter("quarantined_messages", "", "messages that were set aside")
UP: Final = _gauge("store_up", "store", "1 for a store that answered the dashboard, redis or postgres; else 0")
HITS: Final = _counter("cache_hits", "", "readings of this dashboard that the ledger answered")
MISSES: Final = _counter("cache_misses", "", "readings of this dashboard for which Postgres was asked instead")

#: All metrics, in the order in which they are served.
METRICS: Final[tuple[MetricName, ...]] = tuple(value for value in globals().values() if isinstance(value, MetricName))


def series_of(metric: MetricName) -> tuple[str, ...]:
    """Return the names of the series of a metric, as queries write them."""
    if metric.kind is Kind.HISTOGRAM:
        return tuple(f"{metric.name}_{part}" for part in ("bucket", "count", "sum"))
    return (metric.name,)


def label_of(text: str) -> str:
    """Return a text as the value of a label, cut to its greatest length."""
    return text if len(text) <= MAX_LABEL else text[: MAX_LABEL - 1] + "…"
