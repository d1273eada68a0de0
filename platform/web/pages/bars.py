"""Bars of resources: the amounts of each worker, with its jobs as segments. Lengths are thousandths of a bar."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from celery_capacity.routing.model.amounts import format_memory

#: Length of a bar.
LENGTH: Final = 1000.0
#: Colours of tasks, as classes of the style sheet.
COLOURS: Final = 10
#: Segments of a bar. More jobs are drawn as one segment, of which no eye could tell them apart.
MAX_SEGMENTS: Final = 200
#: Segments of all bars of CPUs of a page, some 200 bytes each, and those of a bar below which the others have none. So
#: a page with many workers stays light.
PAGE_SEGMENTS: Final = 200
FEW_SEGMENTS: Final = 6
#: Amounts of a worker that the bars show, beside named resources.
AMOUNTS: Final = ("cpus", "memory", "slots", "allocated_cpus", "allocated_memory", "allocated_slots")


@dataclass(frozen=True, slots=True)
class Segment:
    """A job's part of a bar. `colour`: None for what jobs hold that are not listed."""

    start: float
    length: float
    job: Mapping[str, Any] | None
    colour: int | None
    amount: str


@dataclass(frozen=True, slots=True)
class Bar:
    """Resource of a worker or of the cluster. `words`: "12 of 16"."""

    resource: str
    allocated: str
    total: str
    available: str
    percent: int
    segments: Sequence[Segment] = field(default_factory=tuple)

    @property
    def length(self) -> float:
        return LENGTH * min(100, self.percent) / 100


def colour_of(task: str) -> int:
    """Return the colour of a task, always the same one."""
    hashed = 0x811C9DC5  # FNV-1a, which static/layout.js computes too
    for byte in task.encode("utf-8", "backslashreplace"):
        hashed = (hashed ^ byte) * 0x01000193 & 0xFFFFFFFF
    return hashed % COLOURS


def totals(resources: Mapping[str, Any]) -> list[Bar]:
    """Return a bar for each resource of the cluster."""
    return _bars(resources, "total_cpus", "total_memory", "total_slots")


def of_many(sums: Mapping[str, Any]) -> list[Bar]:
    """Return a bar for each resource of some workers, without their jobs."""
    return _bars(sums, "cpus", "memory", "slots")


def of_worker(worker: Mapping[str, Any], jobs: Sequence[Mapping[str, Any]], workers: int = 1) -> list[Bar]:
    """Return a bar for each resource of a worker, with the jobs that it holds. `workers`: those on the page.

    Of many workers only the bars of CPUs have the jobs as segments.
    """
    most = min(MAX_SEGMENTS, max(1, PAGE_SEGMENTS // workers))
    return _bars(worker, "cpus", "memory", "slots", jobs[:most], jobs[: most // 3 if most >= FEW_SEGMENTS else 0])


def _bars(
    amounts: Mapping[str, Any],
    cpus: str,
    memory: str,
    slots: str,
    jobs: Sequence[Mapping[str, Any]] = (),
    listed: Sequence[Mapping[str, Any]] = (),
) -> list[Bar]:
    """Return the bars. `jobs`: the segments of the bar of CPUs; `listed`: those of the others."""
    bars = [
        _bar("cpus", amounts["allocated_cpus"], amounts[cpus], jobs),
        _bar("memory", amounts["allocated_memory"], amounts[memory], listed),
    ]
    bars += [_bar(name, part["allocated"], part["total"], listed) for name, part in sorted(amounts["named"].items())]
    # A slot says little where jobs ask for CPUs, so it comes last.
    return [*bars, _bar("slots", amounts["allocated_slots"], amounts[slots], listed)]


def _bar(resource: str, allocated: float, total: float, jobs: Sequence[Mapping[str, Any]]) -> Bar:
    percent = round(100 * allocated / total) if total else 0
    segments = _segments(resource, allocated, total, jobs) if total and allocated else []
    available = _words(resource, max(0, total - allocated))
    return Bar(resource, _words(resource, allocated), _words(resource, total), available, percent, segments)


def _segments(resource: str, allocated: float, total: float, jobs: Sequence[Mapping[str, Any]]) -> list[Segment]:
    """Return the segments. They never pass the end of the bar, and amounts of unlisted jobs come last."""
    scale = LENGTH / max(total, allocated)
    segments, start, left = [], 0.0, allocated
    for job in jobs[:MAX_SEGMENTS]:
        amount = min(left, job["request"].get(resource, 0))
        if amount > 0:
            words = _words(resource, amount)
            segments.append(Segment(start, amount * scale, job, colour_of(job["name"]), words))
            start += amount * scale
            left -= amount
    if left > 0:
        segments.append(Segment(start, left * scale, None, None, _words(resource, left)))
    return segments


def _words(resource: str, amount: float) -> str:
    return format_memory(int(amount)) if resource == "memory" else f"{amount:.10g}"
