"""Lines of workers, from either store, and a page of them in the order of their names.

The sums of a cluster are over all workers, and its page has few. So of the others on the ledger one book of each kind
is read, and their amounts are added up as often as they occur.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
class Others:
    """Live workers without a line, since they are not on the page: their names, and the sums of their amounts."""

    names: frozenset[str] = frozenset()
    capacity: Mapping[str, int] = field(default_factory=dict)
    allocated: Mapping[str, int] = field(default_factory=dict)


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


@contextmanager
def without_collection() -> Iterator[None]:
    """Put the cyclic garbage collection off while many objects are made that all stay.

    It would run again and again over all of them, and find nothing: a third of the time for 10,000 workers.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class LedgerWorkers:
    """The workers of the ledger at one moment, by their books.

    `lines`: the live workers on the page, by name. `others`: the other live ones. `silent`: registered workers that are
    not live. `lapsed`: millicores that workers without a lease still have allocated.
    """

    def __init__(self, head: snapshot.Head, page: Page, books: Mapping[str, Any], views: Mapping[str, Any]) -> None:
        """Sort the workers out. `books`, `views`: replies of the ledger by worker; all expected on the page have views.

        The page is expected by the index of leases. Where a book differs from it, the page has another worker.
        """
        self._head, self._books, self._views = head, books, views
        self._first_of = dict[Hashable, WorkerLine | None]()
        self.silent, self.lapsed = list[Book](), 0
        lines, parts = dict[str, WorkerLine](), dict[str, snapshot.BookParts]()
        for worker, reply in books.items():
            part = None if worker in views else snapshot.part_book(reply)
            if part is not None and part[2] > head.now and self._is_live(part[0], worker):
                parts[worker] = part
            elif (book := snapshot.parse_book(worker, reply)) is None:
                continue
            elif head.is_live(book):
                lines[worker] = self._line(book)
            else:
                self.lapsed += book.allocated.get(CPUS, 0)
                self.silent += [book.to_policy(head.now)] if head.is_registered(book) else []
        for worker in page.of([*lines, *parts])[0]:
            if parts.pop(worker, None) is not None:
                lines[worker] = self._line_of(worker)
        self.lines = tuple(lines[worker] for worker in sorted(lines))
        self.others = Others(frozenset(parts), *self._sums(parts.values()))

    @property
    def catalogues(self) -> set[str]:
        """Return the catalogues of the live workers."""
        return {line.catalogue for line in (*self.lines, *filter(None, self._first_of.values()))}

    def kinds(self, named: Collection[str]) -> list[WorkerLine]:
        """Return a live worker of each kind, and the live workers of these names."""
        lines = {
            (
                tuple(line.capacity.items()),
                tuple(line.labels.items()),
                line.status,
                line.name if line.name in named else "",
            ): line
            for line in self.lines
        }
        others = (self._line_of(worker) for worker in sorted(self.others.names.intersection(named)))
        return [*lines.values(), *filter(None, self._first_of.values()), *others]

    def _is_live(self, kind: Hashable, worker: str) -> bool:
        """Return True if workers of a kind are live while their leases run. `worker`: one of them."""
        if kind not in self._first_of:
            book = snapshot.parse_book(worker, self._books[worker])
            self._first_of[kind] = self._line(book) if book is not None and self._head.is_live(book) else None
        return self._first_of[kind] is not None

    def _sums(self, parts: Collection[snapshot.BookParts]) -> tuple[dict[str, int], dict[str, int]]:
        """Return the sums of the capacities and of the allocations."""
        capacity, allocated = Counter[str](), Counter[str]()
        for kind, times in Counter(kind for kind, _, _ in parts).items():
            line = self._first_of[kind]
            assert line is not None  # only live kinds have parts
            capacity.update({name: times * amount for name, amount in line.capacity.items()})
        for (layout, values), times in Counter(amounts_ for _, amounts_, _ in parts).items():
            sums = zip(layout.allocated, values, strict=True)
            allocated.update({name: times * int(amount) for (name, _), amount in sums})
        return dict(capacity), dict(allocated)

    def _line_of(self, worker: str) -> WorkerLine:
        book = snapshot.parse_book(worker, self._books[worker])
        assert book is not None  # its parts were read
        return self._line(book)

    def _line(self, book: snapshot.WorkerBook) -> WorkerLine:
        return ledger_line(self._head.now, book, self._views.get(book.worker, UNSEEN))


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
