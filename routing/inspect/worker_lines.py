"""Lines of workers, from either store, and a page of them in the order of their names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

from celery_capacity.routing.ledger import snapshot
from celery_capacity.routing.model import amounts
from celery_capacity.routing.model.amounts import CPUS, MEMORY, SLOTS, is_named
from celery_capacity.routing.model.states import WorkerStatus
from celery_capacity.routing.policy.placement import Book
from celery_capacity.routing.store.controls import Cordon

#: Fields of a worker's view that only its heartbeat knows.
SEEN: Final = ("heartbeat_at", "hostname", "pid", "started_at", "version")
UNSEEN: Final = (None,) * len(SEEN)


@dataclass(frozen=True, slots=True)
class Page:
    """The workers to show, by name: at most `limit` of them (None: all), behind the name `after`."""

    limit: int | None = None
    after: str = ""

    def of(self, names: Iterable[str]) -> tuple[list[str], str | None]:
        """Return the names on the page, and the last of them if more names follow."""
        behind = sorted(name for name in names if name > self.after)
        shown = behind if self.limit is None else behind[: self.limit]
        return shown, shown[-1] if shown and len(shown) < len(behind) else None


#: The page with all workers.
WHOLE: Final = Page()


@dataclass(frozen=True, slots=True)
class WorkerLine:
    """A live worker. `heartbeat_age`: seconds, None where nobody noted a heartbeat."""

    name: str
    status: str
    capacity: Mapping[str, int]
    allocated: Mapping[str, int]
    heartbeat_age: float | None
    hostname: str | None
    pid: int | None
    incarnation: str
    started_at: str | None
    version: str | None
    #: catalogue of its registered tasks; "" where it takes any, or where Postgres tells of it
    catalogue: str = ""
    #: the operator's order that holds it back; None for none
    cordon: Cordon | None = None
    #: seconds until it ends, None where no end is known
    left: float | None = None
    #: its labels, by key
    labels: Mapping[str, str] = field(default_factory=dict)

    def to_policy(self) -> Book:
        """Return the worker as the policy sees it; its tasks are judged elsewhere."""
        admitting = self.status == WorkerStatus.READY
        return Book(self.name, self.capacity, self.allocated, admitting=admitting, labels=self.labels)

    def to_json(self) -> dict[str, Any]:
        age = self.heartbeat_age
        return {
            "name": self.name,
            "status": self.status,
            "cpus": amounts.cpus_number(self.capacity.get(CPUS, 0)),
            "allocated_cpus": amounts.cpus_number(self.allocated.get(CPUS, 0)),
            "heartbeat_age_seconds": None if age is None else round(age, 3),
            "memory": self.capacity.get(MEMORY, 0),
            "allocated_memory": self.allocated.get(MEMORY, 0),
            "slots": self.capacity.get(SLOTS, 0),
            "allocated_slots": self.allocated.get(SLOTS, 0),
            "named": named_amounts(self.capacity, self.allocated),
            "queues": amounts.queues_of(self.capacity),
            "labels": dict(self.labels),
            "hostname": self.hostname,
            "pid": self.pid,
            "incarnation": self.incarnation,
            "started_at": self.started_at,
            "version": self.version,
            "cordon": None if self.cordon is None else self.cordon.to_json(),
            "left_seconds": None if self.left is None else round(self.left, 3),
        }


def named_amounts(capacity: Mapping[str, int], allocated: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """Return the amounts of the resources that have no fields of their own."""
    names = sorted(name for name in {**capacity, **allocated} if is_named(name))
    return {name: {"total": capacity.get(name, 0), "allocated": allocated.get(name, 0)} for name in names}


def ledger_line(now: int, book: snapshot.WorkerBook, view: Sequence[Any]) -> WorkerLine:
    """Return the line of a live worker at `now` (ms). `view`: the values of `SEEN`."""
    if view is not UNSEEN:
        view = [None if value is None else snapshot.text(value) for value in view]
    beat, hostname, pid, started_at, version = view
    return WorkerLine(
        name=book.worker,
        status=book.cordoned or book.status,
        capacity=book.capacity,
        allocated=book.allocated,
        heartbeat_age=max(0.0, now / 1000 - datetime.fromisoformat(beat).timestamp()) if beat else None,
        hostname=hostname,
        pid=int(pid) if pid else None,
        incarnation=book.incarnation,
        started_at=started_at,
        version=version,
        catalogue=book.catalogue,
        left=None if book.ends is None else max(0, book.ends - now) / 1000,
        labels=book.labels,
    )


def row_line(row: Any, now: datetime, allocated: Mapping[str, int]) -> WorkerLine:
    """Return the line of a worker from its row."""
    return WorkerLine(
        name=row.name,
        status=row.status,
        capacity=amounts.from_people(row.capacity),
        allocated=allocated,
        heartbeat_age=max(0.0, (now - row.seen_at).total_seconds()),
        hostname=row.hostname,
        pid=row.pid,
        incarnation=row.incarnation,
        started_at=row.started_at.astimezone(UTC).isoformat(timespec="milliseconds"),
        version=row.version,
        left=None if row.ends_at is None else max(0.0, (row.ends_at - now).total_seconds()),
        labels=row.labels,
    )
