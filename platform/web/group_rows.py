"""Rows of the groups of waiting jobs: how many jobs are alike in request, task, queue and priority, and the first one.

Postgres counts the rows of a small backlog. Of a large one the ledger has the numbers by shape, and Postgres gives the
first row of each group, so that the cost grows with the shapes and not with the jobs.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final
from weakref import WeakKeyDictionary

from redis.exceptions import RedisError
from sqlalchemy import Connection, Engine, text

from celery_capacity.routing.database import staying_rows
from celery_capacity.routing.database.authority import read_authority
from celery_capacity.routing.database.job_conditions import like_pattern
from celery_capacity.routing.database.staying_rows import Level, Staying
from celery_capacity.routing.inspect.waiting import COUNTED_SHARE, LedgerReading
from celery_capacity.routing.ledger import keys, snapshot
from celery_capacity.routing.model.request import split_shape
from celery_capacity.routing.model.states import Store
from celery_capacity.routing.policy.placement import SUBMISSIONS, TOP_PRIORITY, order
from celery_capacity.routing.policy.tenants import DEFAULT_TENANT

#: Groups that are listed: those whose first jobs come first.
MAX_GROUPS: Final = 100
#: Jobs that stay in Postgres from which on the ledger counts the groups. So many rows are counted in 2 ms.
MANY: Final = 2000
#: Accepted jobs up to which the ledger is asked about each. Beyond, many are on their way, and Postgres counts.
MAX_ACCEPTED: Final = 1000

_GROUPS: Final = text(r"""
SELECT alike.*, jobs.id AS first FROM (
  SELECT shape, name, queue, priority, count(*) AS waiting, min(seq) AS seq,
    extract(epoch FROM clock_timestamp() - min(submitted_at))::float AS oldest
  FROM jobs WHERE state IN ('accepted', 'waiting') AND revoked_at IS NULL
    AND (CAST(:task AS text) IS NULL OR name LIKE :task ESCAPE '\')
    AND (CAST(:queue AS text) IS NULL OR queue LIKE :queue ESCAPE '\')
    AND (CAST(:tenant AS text) IS NULL OR CASE WHEN :tenant = :default THEN shape NOT LIKE '%,$%'
      ELSE strpos(shape || ',', ',$' || :tenant || ',') > 0 END)
  GROUP BY shape, name, queue, priority ORDER BY priority DESC, min(seq) LIMIT :most
) AS alike
JOIN jobs ON jobs.state IN ('accepted', 'waiting') AND (- jobs.priority) = - alike.priority AND jobs.seq = alike.seq
ORDER BY alike.priority DESC, alike.seq
""")
_COLUMNS: Final = "id, shape, name, queue, priority, seq, extract(epoch FROM clock_timestamp() - submitted_at)::float"
_THESE: Final = text(f"SELECT {_COLUMNS} FROM jobs WHERE id = ANY(CAST(:ids AS text[]))")
_ACCEPTED: Final = text(
    f"SELECT {_COLUMNS} FROM jobs WHERE state = 'accepted' AND revoked_at IS NULL ORDER BY seq LIMIT :most"
)


@dataclass(frozen=True, slots=True)
class GroupFilter:
    """Conditions that all groups must meet. In `task` and `queue` a `*` is any text; `reason` is a reason's word."""

    task: str | None = None
    queue: str | None = None
    tenant: str | None = None
    reason: str | None = None

    def values(self) -> dict[str, str | None]:
        """Return the values for the query. The reason is no column: it is looked up."""
        task, queue = (None if name is None else like_pattern(name) for name in (self.task, self.queue))
        return {"task": task, "queue": queue, "tenant": self.tenant, "default": DEFAULT_TENANT}

    @property
    def is_open(self) -> bool:
        """Return True if no column has a condition."""
        return self.task is None and self.queue is None and self.tenant is None


@dataclass(frozen=True, slots=True)
class GroupRow:
    """A group: the columns in which its jobs are alike, their number, and the first job with its `seq`.

    `oldest`: seconds since the oldest of them was submitted. By the ledger that is the first one.
    """

    shape: str
    name: str
    queue: str
    priority: int
    waiting: int
    seq: int
    oldest: float
    first: str

    @property
    def key(self) -> tuple[str, str, str, int]:
        return self.shape, self.name, self.queue, self.priority


@dataclass(frozen=True, slots=True)
class _Part:
    """Jobs of one shape and priority in one store: how many, and the first one with its order."""

    waiting: int
    job: str
    order: int


def read(connection: Connection, reading: LedgerReading, chosen: GroupFilter) -> list[GroupRow]:
    """Return the groups in the order of their first jobs, `MAX_GROUPS` at most."""
    rows = _by_ledger(connection, reading) if chosen.is_open else None
    if rows is None:
        return [GroupRow(*row) for row in connection.execute(_GROUPS, {"most": MAX_GROUPS, **chosen.values()})]
    return sorted(rows, key=lambda row: order(row.priority, row.seq))[:MAX_GROUPS]


def _by_ledger(connection: Connection, reading: LedgerReading) -> list[GroupRow] | None:
    """Return all groups with the numbers of the ledger; None where Postgres must count.

    That is so for a small backlog, while Postgres decides or the ledger is not there, while many jobs are on their way
    to the ledger, and where a shape does not name its task: jobs of several tasks of Celery itself may have it.
    """
    try:
        head = reading.head
        if head.epoch is None or sum(head.staying.values()) < MANY:
            return None
        if read_authority(connection).authority == Store.POSTGRES:
            return None
        accepted = connection.execute(_ACCEPTED, {"most": MAX_ACCEPTED + 1}).all()
        if len(accepted) > MAX_ACCEPTED:
            return None
        parts = list(_filed(reading))
        staying = reading.staying(connection)
        if not all(split_shape(shape).task for shape in (*staying, *(shape for shape, _ in parts))):
            return None
        cards = snapshot.read_cards(reading.client, [row.id for row in accepted])
    except RedisError:
        return None
    mixed = [shape for shape, jobs in staying.items() if jobs.first // SUBMISSIONS != jobs.last // SUBMISSIONS]
    by_level = [*((shape, staying[shape]) for shape in staying.keys() - mixed), *_levels(connection, mixed)]
    parts += [(shape, _Part(jobs.number, jobs.job, jobs.first)) for shape, jobs in by_level]
    firsts = {row.id: row for row in connection.execute(_THESE, {"ids": [part.job for _, part in parts]})}
    # The job of a part may have gone meanwhile, as its jobs are about to.
    rows = [_row(firsts[part.job], part) for _, part in parts if part.job in firsts]
    # A job without a key, or with a tombstone, is not in the ledger: it is on its way there.
    on_their_way = [row for row in accepted if (card := cards.get(row.id)) is None or card.is_tombstone]
    return _merged([*rows, *(_row(row, _Part(1, row.id, order(row.priority, row.seq))) for row in on_their_way)])


#: Seconds for which counts by priority are used again at most, however long the count took.
COUNTED_FOR: Final = 30.0

#: The newest counts by priority of each database: until when they are used, the shapes, and the numbers.
_counted: WeakKeyDictionary[Engine, tuple[float, frozenset[str], dict[Level, int]]] = WeakKeyDictionary()


def _levels(connection: Connection, shapes: Sequence[str]) -> list[tuple[str, Staying]]:
    """Return the jobs of shapes with several priorities, by priority, each with the first job of this moment.

    Numbers are used again for a while, at most `COUNTED_FOR` seconds. Until then frequent readers cost Postgres at most
    `COUNTED_SHARE` of a core. A new shape is counted at once. A new priority of a shape comes with the next count.
    """
    begin = time.monotonic()
    until, counted_shapes, numbers = _counted.get(connection.engine, (float("-inf"), frozenset[str](), {}))
    if begin >= until or not counted_shapes.issuperset(shapes):
        numbers = staying_rows.levels(connection, shapes)
        end = time.monotonic()
        until = end + min((end - begin) / COUNTED_SHARE, COUNTED_FOR)
        _counted[connection.engine] = until, frozenset(shapes), numbers
    asked = set(shapes)
    return staying_rows.firsts(connection, {level: number for level, number in numbers.items() if level[0] in asked})


def _row(first: Any, part: _Part) -> GroupRow:
    level, seq = divmod(part.order, SUBMISSIONS)
    priority = TOP_PRIORITY - level
    return GroupRow(first.shape, first.name, first.queue, priority, part.waiting, seq, first[-1], first.id)


def _merged(rows: Iterable[GroupRow]) -> list[GroupRow]:
    """Return one row for each group: its jobs may wait in both stores, and under two shapes after lost attempts."""
    groups: dict[tuple[str, str, str, int], GroupRow] = {}
    for row in sorted(rows, key=lambda row: row.seq):
        before = groups.get(row.key)
        if before is None:
            groups[row.key] = row
        else:
            oldest = max(before.oldest, row.oldest)
            groups[row.key] = replace(before, waiting=before.waiting + row.waiting, oldest=oldest)
    return list(groups.values())


def _filed(reading: LedgerReading) -> Iterator[tuple[str, _Part]]:
    """Yield the shapes of the ledger's waiting jobs, with a part for each priority. Raises `RedisError`."""
    shapes = reading.head.shapes
    ends = (("ZRANGE", keys.wait(shape), end, end, "WITHSCORES") for shape in shapes for end in ("0", "-1"))
    replies = snapshot.read_many(reading.client, ends)
    spans = {
        shape: (_orders(first)[0][1] // SUBMISSIONS, _orders(last)[0][1] // SUBMISSIONS)
        for shape, first, last in zip(shapes, replies[::2], replies[1::2], strict=True)
        if first and last
    }
    asked = [(shape, level) for shape, (first, last) in spans.items() for level in range(first, last + 1)]
    yield from _of_levels(reading, asked)


def _of_levels(reading: LedgerReading, asked: Sequence[tuple[str, int]]) -> Iterator[tuple[str, _Part]]:
    commands: list[tuple[str, ...]] = []
    for shape, level in asked:
        bounds = str(level * SUBMISSIONS), str((level + 1) * SUBMISSIONS - 1)
        commands.append(("ZCOUNT", keys.wait(shape), *bounds))
        commands.append(("ZRANGEBYSCORE", keys.wait(shape), *bounds, "WITHSCORES", "LIMIT", "0", "1"))
    replies = snapshot.read_many(reading.client, commands)
    for (shape, _), number, first in zip(asked, replies[::2], replies[1::2], strict=True):
        for job, position in _orders(first):
            yield shape, _Part(int(number), job, position)


def _orders(reply: Sequence[Any]) -> list[tuple[str, int]]:
    """Return the members of a reply WITHSCORES and their orders: pairs, or two values each in the older protocol."""
    pairs = reply if reply and isinstance(reply[0], list) else list(zip(reply[::2], reply[1::2], strict=True))
    return [(snapshot.text(member), int(float(score))) for member, score in pairs]
