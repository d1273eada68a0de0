"""The backlog as the ledger has it: a line for the waiting jobs of each request, blocked ones first."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final
from urllib.parse import unquote
from weakref import WeakKeyDictionary

import redis as redispy
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from celery_capacity.routing.database import staying_rows
from celery_capacity.routing.database.staying_rows import Staying
from celery_capacity.routing.ledger import keys, snapshot
from celery_capacity.routing.ledger.admission import shape_held
from celery_capacity.routing.model.reasons import Reason
from celery_capacity.routing.model.request import (
    Request,
    alternatives_text,
    alternatives_to_show,
    filed_shape,
    split_shape,
    terms_of,
)
from celery_capacity.routing.policy.feasibility import judge, kinds_of, likeness, with_named
from celery_capacity.routing.policy.labels import named_worker, place_of
from celery_capacity.routing.policy.placement import SUBMISSIONS, TOP_PRIORITY, Book, Refusal, order
from celery_capacity.routing.store import backlog

#: Reasons that time does not change: somebody must start another worker, or cancel the jobs.
BLOCKING: Final = frozenset(
    {Reason.NO_TASK, Reason.NO_QUEUE, Reason.NO_LABEL, Reason.UNKNOWN_RESOURCE, Reason.TOO_LARGE}
)
#: The first and the last order of each priority, as text. The first job between them is the oldest of the priority.
_ORDERS: Final = tuple(
    (str(order(priority, 0)), str(order(priority, 0) + SUBMISSIONS - 1)) for priority in range(TOP_PRIORITY + 1)
)
#: Reasons of the last reading by request and place, for its kinds of workers: frequent readers ask for the same ones.
_blocked_by: dict[Hashable, dict[Hashable, Reason | None]] = {}
#: Lost attempts after which a job ends, where the caller does not say.
MAX_LOSSES: Final = 3
#: Greatest share of a core of Postgres that one reader takes to count jobs that nobody has marked. A count that took
#: 0.5 s is shown for 10 s.
LEFT_SHARE: Final = 0.05
#: Greatest share of a core of Postgres that one reader takes to count marked rows.
COUNTED_SHARE: Final = 0.01


@dataclass(frozen=True, slots=True)
class BacklogLine:
    """The waiting jobs of one request. `oldest`: seconds since the first of them was submitted.

    `unknown_task`: their task, where no live worker has registered it; else "". `blocked`: the reason for which no live
    worker takes them, not even an empty one; None where one does.
    """

    request: Request
    waiting: int
    oldest: float | None
    unknown_task: str = ""
    blocked: Reason | None = None
    #: terms of its shapes that say where it may run
    terms: str = ""

    @property
    def alternatives(self) -> tuple[Request, ...]:
        """Return the alternatives of the jobs in order; none where they have one request."""
        return alternatives_to_show(self.request.shape + self.terms)

    @property
    def request_text(self) -> str:
        """Return what each of the jobs needs, in words."""
        return alternatives_text(self.alternatives or (self.request,))

    def to_json(self) -> dict[str, Any]:
        return {
            "queue": self.request.queue,
            "request": self.request.to_people(),
            "alternatives": [request.to_people() for request in self.alternatives],
            "where": str(place_of(self.terms)) or None,
            "waiting": self.waiting,
            "oldest_seconds": None if self.oldest is None else round(self.oldest, 3),
            "unknown_task": self.unknown_task or None,
            "blocked": None if self.blocked is None else self.blocked.value,
        }


def queue_reads(shapes: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Yield the commands that read the queues of these shapes. `read_backlog` takes the replies."""
    for shape in shapes:
        key = keys.wait(shape)
        yield "ZCARD", key
        yield "ZRANGE", key, "0", "0", "WITHSCORES"
        yield "ZRANGE", key, "-1", "-1", "WITHSCORES"


def read_backlog(
    client: redispy.Redis, head: snapshot.Head, replies: Iterator[Any], catalogues: Collection[str]
) -> tuple[BacklogLine, ...]:
    """Return the lines of the backlog. `catalogues`: those of the live workers.

    That takes one more round trip, and another one where jobs of several priorities wait for one request.
    """
    sizes, ends = {}, {}
    for shape in head.shapes:
        sizes[shape], ends[shape] = int(next(replies)), (_scored(next(replies)), _scored(next(replies)))
    firsts_of = _firsts(client, ends)
    queues = [(shape, sizes[shape], firsts_of[shape]) for shape in head.shapes]
    jobs = [job for _, _, firsts in queues for job in firsts]
    # A worker without a catalogue takes any task. Without a worker there is another reason to wait.
    names = {split_shape(shape).task for shape in head.shapes} - {""} if catalogues and "" not in catalogues else set()
    heads_of_jobs = (("GETRANGE", keys.job(job), "0", str(snapshot.HEAD_BYTES - 1)) for job in jobs)
    tasks = (("SISMEMBER", keys.tasks(catalogue), name) for name in names for catalogue in catalogues)
    answers = iter(snapshot.read_many(client, (*heads_of_jobs, *tasks)))
    heads = snapshot.parse_jobs(client, {job: next(answers) for job in jobs})
    submitted = {job: time for job, fields in heads.items() if (time := int(fields.get("submitted", 0))) > 0}
    unknown = {name for name in names if sum(int(next(answers)) for _ in catalogues) == 0}
    lines: dict[tuple[str, str, str], BacklogLine] = {}
    for shape, filed, firsts in queues:
        waiting = filed + head.staying.get(shape, 0)
        asked, name, _ = split_shape(shape)
        task = name if name in unknown else ""
        times = [submitted[job] for job in firsts if job in submitted]
        oldest = max(0.0, (head.now - min(times)) / 1000) if times else None
        key = (task, asked, terms_of(shape))
        if waiting:
            line = BacklogLine(Request.from_shape(asked), waiting, oldest, unquote(task), terms=key[2])
            lines[key] = _together(lines[key], line) if key in lines else line
    return tuple(lines.values())


def blocked_first(lines: Iterable[BacklogLine], registered: Iterable[Book]) -> tuple[BacklogLine, ...]:
    """Return the lines with the reasons that block them, these first. `registered`: the books of all workers.

    Empty workers are judged. So one worker of each capacity is enough, however many there are.
    """
    books = list(registered)
    kinds = kinds_of(books)
    key = tuple(likeness(book) for book in kinds)
    before, reasons = _blocked_by.get(key, {}), dict[Hashable, Reason | None]()
    judged = []
    for line in lines:
        if named_worker(line.terms):
            judged.append(replace(line, blocked=_blocked(line, with_named(kinds, books, line.terms))))
            continue
        asked = (line.request, line.terms, line.unknown_task)
        reasons[asked] = before[asked] if asked in before else _blocked(line, kinds)
        judged.append(replace(line, blocked=reasons[asked]))
    _blocked_by.clear()
    _blocked_by[key] = reasons
    return tuple(sorted(judged, key=lambda line: (line.blocked is None, not line.unknown_task)))


def _blocked(line: BacklogLine, books: Sequence[Book]) -> Reason | None:
    if line.unknown_task:
        return Reason.NO_TASK
    decision = judge(line.request, books, terms=line.terms)
    return decision.reason if isinstance(decision, Refusal) and decision.reason in BLOCKING else None


def merged(lines: Iterable[BacklogLine]) -> tuple[BacklogLine, ...]:
    """Return the lines with one for each request and place: its jobs wait in a queue for each class of run times."""
    by_request: dict[tuple[Request, str], BacklogLine] = {}
    for line in lines:
        before = by_request.get((line.request, line.terms))
        by_request[line.request, line.terms] = line if before is None else _together(before, line)
    return tuple(by_request.values())


def _together(first: BacklogLine, second: BacklogLine) -> BacklogLine:
    """Return the line of two tasks with one request."""
    ages = [line.oldest for line in (first, second) if line.oldest is not None]
    waiting = first.waiting + second.waiting
    return replace(first, waiting=waiting, oldest=max(ages, default=None))


def _scored(reply: Sequence[Any]) -> tuple[str, int] | None:
    """Return the only member of a reply WITHSCORES and its score: a pair, or two values in the older protocol."""
    if not reply:
        return None
    member, score = reply[0] if isinstance(reply[0], list) else reply
    return snapshot.text(member), int(float(score))


def _firsts(
    client: redispy.Redis, ends: Mapping[str, tuple[tuple[str, int] | None, tuple[str, int] | None]]
) -> dict[str, list[str]]:
    """Return the first job of each priority, by shape. `ends`: the first and the last job of each shape, with orders.

    Of a shape whose first and last job have one priority, as nearly always, nothing more is read.
    """
    firsts: dict[str, list[str]] = {}
    levels: list[tuple[str, int]] = []
    for shape, (first, last) in ends.items():
        firsts[shape] = [] if first is None else [first[0]]
        if first is not None and last is not None:
            levels += [(shape, level) for level in range(first[1] // SUBMISSIONS + 1, last[1] // SUBMISSIONS + 1)]
    reads = (("ZRANGEBYSCORE", keys.wait(shape), *_ORDERS[TOP_PRIORITY - n], "LIMIT", "0", "1") for shape, n in levels)
    for (shape, _), members in zip(levels, snapshot.read_many(client, reads), strict=True):
        firsts[shape] += [snapshot.text(member) for member in members]
    return firsts


def count_before(client: redispy.Redis, shapes: Sequence[str], position: int) -> dict[str, int]:
    """Count the jobs of each of these shapes that wait in the ledger and come before an order, in one round trip."""
    replies = snapshot.read_many(client, (("ZCOUNT", keys.wait(shape), "-inf", f"({position}") for shape in shapes))
    return {shape: int(reply) for shape, reply in zip(shapes, replies, strict=True)}


# -- waiting jobs that stay in Postgres, in rows that nobody has marked yet --------------------------------------------


def read_borders(client: redispy.Redis) -> dict[str, int]:
    """Return the filed shapes of which jobs stay in Postgres, with the order from which on they do."""
    rows: Any = client.zrange(keys.BORDER, 0, -1, withscores=True)
    return {snapshot.text(shape): int(border) for shape, border in rows}


def count_left(
    client: redispy.Redis,
    connection: Connection,
    borders: Mapping[str, int],
    most_losses: int = MAX_LOSSES,
    before: int | None = None,
) -> Counter[str]:
    """Count the jobs that the ledger left in Postgres, and whose rows nobody has marked yet, by filed shape.

    These are the accepted jobs at the border of their shape or behind it. `before`: count only jobs that come before
    this order. Raises `RedisError`, and the errors of Postgres.
    """
    counts, parts = Counter[str](), list[tuple[str, tuple[backlog.AcceptedGroup, int, int]]]()
    for group in backlog.accepted_groups(connection):
        filed = shape_held(filed_shape(group.shape, group.name), group.losses, most_losses)
        if filed not in borders:
            continue
        level = order(group.priority, 0)
        first, until = borders[filed] - level, SUBMISSIONS if before is None else before - level
        if first <= group.first and group.last < until:
            counts[filed] += group.number
        elif first <= group.last and group.first < until:
            parts.append((filed, (group, max(0, first), min(until, SUBMISSIONS))))
    numbers = backlog.accepted_between(connection, [asked for _, asked in parts])
    for (filed, _), number in zip(parts, numbers, strict=True):
        counts[filed] += number
    counts.subtract(_filed_behind(client, connection, {shape: borders[shape] for shape in counts}, before))
    return +counts


def _filed_behind(
    client: redispy.Redis, connection: Connection, borders: Mapping[str, int], before: int | None
) -> Counter[str]:
    """Count the accepted jobs behind their border that the ledger has: jobs of higher priorities moved the border."""
    until = "+inf" if before is None else f"({before}"
    reads = (("ZRANGEBYSCORE", keys.wait(shape), str(border), until) for shape, border in borders.items())
    replies = zip(borders, snapshot.read_many(client, reads), strict=True)
    shapes = {snapshot.text(job): shape for shape, jobs in replies for job in jobs}
    return Counter(shapes[job] for job in backlog.still_accepted(connection, list(shapes)))


#: The newest count of each database: until when it is shown (monotonic), the marked jobs of that time, and the count.
_counted: WeakKeyDictionary[Engine, tuple[float, Mapping[str, int], Counter[str]]] = WeakKeyDictionary()


def with_left(client: redispy.Redis, engine: Engine, head: snapshot.Head) -> snapshot.Head:
    """Return the head of a ledger with the jobs of which it does not know whether they stay in Postgres.

    A count is shown again for a while, unless rows were marked since. So frequent readers cost Postgres at most
    `LEFT_SHARE` of a core. Where Postgres does not answer, the head stays as it is. Raises `RedisError`.
    """
    until, marked, left = _counted.get(engine, (float("-inf"), {}, Counter[str]()))
    begin = time.monotonic()
    if begin >= until or marked != head.staying:
        try:
            with engine.connect() as connection:
                left = count_left(client, connection, read_borders(client))
        except (DBAPIError, PoolTimeout):
            return head
        end = time.monotonic()
        _counted[engine] = end + (end - begin) / LEFT_SHARE, head.staying, left
    staying = dict(Counter(head.staying) + left)
    return replace(head, staying=staying, shapes=tuple(dict.fromkeys([*head.shapes, *staying])))


#: The newest count of marked rows of each database: until when it is used, epoch and numbers of the ledger then, and
#: the count.
_marked: WeakKeyDictionary[Engine, tuple[float, int | None, Mapping[str, int], Mapping[str, int]]] = WeakKeyDictionary()


def staying_numbers(connection: Connection, noted: Mapping[str, int], epoch: int | None) -> dict[str, int]:
    """Return the number of jobs that stay in Postgres in marked rows, by shape.

    `noted`: their numbers by the ledger. `epoch`: that of the ledger, None where it is cold.

    The ledger notes at once which rows are marked and fetched. It does not note a row whose job is cancelled there. So
    all rows are counted from time to time, and the changes since then are the ledger's. Frequent readers cost Postgres
    at most `COUNTED_SHARE` of a core: 100,000 rows are counted once in some seconds.
    """
    until, opened, before, counted = _marked.get(connection.engine, (float("-inf"), epoch, {}, {}))
    begin = time.monotonic()
    # More jobs went than there were: a correction or a loss of the ledger's numbers is no change of the rows.
    is_corrected = any(counted.get(shape, 0) + noted.get(shape, 0) < number for shape, number in before.items())
    if begin >= until or is_corrected or opened != epoch:
        before, counted = noted, staying_rows.numbers(connection)
        end = time.monotonic()
        _marked[connection.engine] = end + (end - begin) / COUNTED_SHARE, epoch, before, counted
    numbers = Counter(counted)
    numbers.update(noted)
    numbers.subtract(before)
    return dict(+numbers)


#: The newest counts before places of each database: until when they are used, and the numbers by order and shape.
_before: WeakKeyDictionary[Engine, tuple[float, Mapping[int, dict[str, int]]]] = WeakKeyDictionary()


def staying_before_each(
    connection: Connection, orders: Collection[int], staying: Mapping[str, Staying]
) -> Mapping[int, dict[str, int]]:
    """Count the jobs that stay in Postgres and come before each of these orders, by shape. `staying`: all of them.

    Numbers are used again for a while, so that frequent readers cost Postgres at most `COUNTED_SHARE` of a core.
    """
    begin = time.monotonic()
    until, before = _before.get(connection.engine, (float("-inf"), {}))
    if begin >= until:
        before = {}
    if missing := [position for position in orders if position not in before]:
        counts = staying_rows.before_each(connection, missing, staying)
        end = time.monotonic()
        until = until if before else end + (end - begin) / COUNTED_SHARE
        before = {position: counts.get(position) or before.get(position, {}) for position in orders}
        _before[connection.engine] = until, before
    return before


# -- a reading for many jobs ------------------------------------------------------------------------------------------


class LedgerReading:
    """The ledger at a moment, which the explanations of many jobs share.

    Each part is read when it is asked for, and raises `RedisError`.
    `orders`: those of the jobs that are to be explained, if there are many. They are set before the first explanation.
    """

    def __init__(self, client: redispy.Redis) -> None:
        self.client = client
        self.orders: Sequence[int] = ()
        self._before: Mapping[int, dict[str, int]] | None = None
        self._staying: Mapping[str, Staying] | None = None
        self._books_by_tasks: dict[frozenset[str], list[Book]] = {}

    @cached_property
    def head(self) -> snapshot.Head:
        return snapshot.read_head(self.client)

    @cached_property
    def books(self) -> list[snapshot.WorkerBook]:
        """Return the books of all registered workers."""
        books = snapshot.read_books(self.client, self.head.leases).values()
        return [book for book in books if self.head.is_registered(book)]

    @cached_property
    def borders(self) -> Mapping[str, int]:
        """Return the shapes of which jobs stay in Postgres, see `read_borders`."""
        return read_borders(self.client) if self.head.left else {}

    def staying(self, connection: Connection) -> Mapping[str, Staying]:
        """Return the jobs that stay in Postgres, by shape."""
        if self._staying is None:
            numbers = staying_numbers(connection, self.head.staying, self.head.epoch)
            self._staying = staying_rows.ends(connection, numbers)
        return self._staying

    def staying_before(self, connection: Connection, priority: int, seq: int) -> dict[str, int]:
        """Count the jobs that stay in Postgres and come before a place, by shape; for all `orders` in one statement."""
        job_order = order(priority, seq)
        if self._before is None and job_order in self.orders:
            self._before = staying_before_each(connection, self.orders, self.staying(connection))
        before = (self._before or {}).get(job_order)
        return staying_rows.before(connection, priority, seq) if before is None else before

    def registered(self, tasks: Collection[str]) -> list[Book]:
        """Return the books as the policy takes them. Each knows which of these tasks its worker has registered."""
        key = frozenset(tasks)
        if key not in self._books_by_tasks:
            catalogues = {book.catalogue for book in self.books} - {""}
            knowing = snapshot.read_catalogues(self.client, catalogues, tasks)
            self._books_by_tasks[key] = [book.to_policy(self.head.now, knowing) for book in self.books]
        return self._books_by_tasks[key]
