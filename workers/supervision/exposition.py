"""Families of metrics in the text format of Prometheus, for the dashboard and the workers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from celery_capacity.routing.model import amounts
from celery_capacity.routing.model.states import Store
from celery_capacity.workers.supervision import metric_names as names
from celery_capacity.workers.supervision.metric_names import BUCKETS, Kind, MetricName

#: Media type of an exposition.
MEDIA_TYPE: Final[str] = CONTENT_TYPE_LATEST
_FAMILIES: Final = {
    Kind.GAUGE: GaugeMetricFamily,
    Kind.COUNTER: CounterMetricFamily,
    Kind.HISTOGRAM: HistogramMetricFamily,
}

#: Families of prometheus_client, which has no types.
Families = Iterator[Any]


class Histogram:
    """Times in buckets: how many are in each of `BUCKETS`, and behind the last one."""

    __slots__ = ("_counts", "_total")

    def __init__(self) -> None:
        self._counts = [0] * (len(BUCKETS) + 1)
        self._total = 0.0

    def add(self, bucket: int, times: int, total: float) -> None:
        """Add times that lie in one bucket, by its number. `total`: their sum."""
        self._counts[bucket] += times
        self._total += total

    def put_into(self, made: Any, labels: list[str]) -> None:
        """Add the histogram to a family. There each bucket counts all smaller times too."""
        counted, buckets = 0, []
        for bound, count in zip((*map(str, BUCKETS), "+Inf"), self._counts, strict=True):
            counted += count
            buckets.append((bound, float(counted)))
        made.add_metric(labels, buckets, self._total)


class _Collector:
    def __init__(self, collect: Callable[[], Families]) -> None:
        self.collect = collect


def exposition(families: Iterable[Any]) -> bytes:
    """Return families as Prometheus takes them."""
    made = list(families)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(lambda: iter(made)))
    return bytes(generate_latest(registry))


def family(metric: MetricName) -> Any:
    """Return the family of a metric, without samples yet."""
    return _FAMILIES[metric.kind](metric.name, metric.meaning, labels=metric.labels)


def single(metric: MetricName, value: float) -> Any:
    """Return the family of a metric that has no labels."""
    made = family(metric)
    made.add_metric([], value)
    return made


def authority_families(authority: Store | None, epoch: int) -> Families:
    """Yield who decides, and in which epoch. None for `authority`: this process does not know."""
    decides = family(names.AUTHORITY)
    for store in Store:
        decides.add_metric([store.value], store is authority)
    yield decides
    yield single(names.EPOCH, epoch)


def add_resources(capacity: Any, allocated: Any, worker: str, has: Mapping[str, int], holds: Mapping[str, int]) -> None:
    """Add the resources of a worker to both families, in people's units. Queues are no resources there."""
    total, used = (amounts.to_people(amounts.canonical(vector)) for vector in (has, holds))
    for name, amount in total.items():
        capacity.add_metric([name, worker], amount)
        allocated.add_metric([name, worker], used.get(name, 0))
