"""Metrics for Prometheus: names, labels and meanings, which the dashboard, the workers and the documents share."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

#: Bounds of the buckets in which waits and run times are counted (seconds): from admissions at once to a day.
BUCKETS: Final = (0.01, 0.05, 0.25, 1.0, 5.0, 30.0, 120.0, 600.0, 3600.0, 14_400.0, 86_400.0)
#: Value of a label for what has no series of its own: a shape, a task.
OTHER: Final = "other"
#: Tasks with series of their own at the dashboard, and at a worker: a cluster has many workers.
MAX_TASKS: Final = 200
MAX_TASKS_OF_WORKER: Final = 50
#: Characters of the value of a label.
MAX_LABEL: Final = 200


class Kind(Enum):
    """Type of a metric, as Prometheus calls it."""

    GAUGE = "gauge"
    COUNTER = "counter"
    HISTOGRAM = "histogram"


class Server(Enum):
    """Process that serves a metric."""

    DASHBOARD = "dashboard"
    WORKER = "worker"


DASHBOARD: Final = (Server.DASHBOARD,)
BOTH: Final = (Server.DASHBOARD, Server.WORKER)


@dataclass(frozen=True, slots=True)
class MetricName:
    """Name of a metric as queries write it, its type, its labels, its meaning, and the processes that serve it."""

    name: str
    kind: Kind
    labels: tuple[str, ...]
    meaning: str
    served_by: tuple[Server, ...] = DASHBOARD


def _gauge(name: str, labels: str, meaning: str, *served_by: Server) -> MetricName:
    return MetricName(f"platform_{name}", Kind.GAUGE, tuple(labels.split()), meaning, served_by or DASHBOARD)


def _counter(name: str, labels: str, meaning: str) -> MetricName:
    return MetricName(f"platform_{name}_total", Kind.COUNTER, tuple(labels.split()), meaning)


def _histogram(name: str, labels: str, meaning: str, *served_by: Server) -> MetricName:
    return MetricName(f"platform_{name}", Kind.HISTOGRAM, tuple(labels.split()), meaning, served_by or DASHBOARD)


# Both serve these: a series with the label `worker` from either is of that worker, so `max by (worker)` counts it once.
CAPACITY: Final = _gauge(
    "resource_capacity", "resource worker", "capacity of a live worker: CPUs, bytes of memory, counts", *BOTH
)
ALLOCATED: Final = _gauge("resource_allocated", "resource worker", "allocated amount of a live worker", *BOTH)
HEARTBEAT_AGE: Final = _gauge("heartbeat_age_seconds", "worker", "seconds since the last heartbeat of a worker", *BOTH)
AUTHORITY: Final = _gauge("authority", "store", "1 for the store that decides, ledger or postgres; else 0", *BOTH)
EPOCH: Final = _gauge("epoch", "", "epoch of the authority, which grows with each opening of the ledger", *BOTH)
# Times are counts, which add up. A worker's own have names of their own, so that a sum over a Prometheus that scrapes
# the dashboard and workers counts no job twice.
WORKER_RUN: Final = _histogram(
    "worker_run_seconds", "task worker", "seconds from the start of an attempt's body to its end", Server.WORKER
)
WORKER_WAIT: Final = _histogram(
    "worker_wait_seconds",
    "worker",
    "seconds from the time a job was submitted or due to the admission of an attempt that began",
    Server.WORKER,
)
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
