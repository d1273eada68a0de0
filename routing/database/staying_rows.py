"""Waiting jobs that stay in Postgres, by the shapes under which the ledger would file them: their numbers and ends."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from sqlalchemy import Connection, text

from celery_capacity.routing.policy.placement import SUBMISSIONS, TOP_PRIORITY, order

#: Condition of such a row. The index jobs_behind has the first two parts.
STAYS: Final = "behind IS NOT NULL AND state = 'waiting' AND revoked_at IS NULL"
#: By an index alone. The few revoked jobs have another one.
_NUMBERS: Final = text("""
SELECT behind, sum(number) FROM (
  SELECT behind, count(*) AS number FROM jobs WHERE behind IS NOT NULL AND state = 'waiting' GROUP BY behind
  UNION ALL SELECT behind, -count(*) FROM jobs
  WHERE revoked_at IS NOT NULL AND finished_at IS NULL AND behind IS NOT NULL AND state = 'waiting' GROUP BY behind
) AS counted GROUP BY behind
""")
_ENDS: Final = text(f"""
SELECT asked.shape, head.id, head.priority, head.seq, tail.priority, tail.seq
FROM unnest(CAST(:shapes AS text[])) AS asked (shape)
CROSS JOIN LATERAL (
  SELECT id, priority, seq FROM jobs WHERE behind = asked.shape AND {STAYS} ORDER BY -priority, seq LIMIT 1
) AS head
CROSS JOIN LATERAL (
  SELECT priority, seq FROM jobs WHERE behind = asked.shape AND {STAYS} ORDER BY -priority DESC, seq DESC LIMIT 1
) AS tail
""")
_LEVELS: Final = text(f"""
SELECT behind, priority, count(*) FROM jobs
WHERE behind = ANY(CAST(:shapes AS text[])) AND {STAYS} GROUP BY behind, priority
""")
_FIRSTS: Final = text(f"""
SELECT asked.number, head.id, head.priority, head.seq
FROM unnest(CAST(:shapes AS text[]), CAST(:priorities AS int[])) WITH ORDINALITY AS asked (shape, priority, number)
CROSS JOIN LATERAL (
  SELECT id, priority, seq FROM jobs
  WHERE behind = asked.shape AND (- jobs.priority) = (- asked.priority) AND {STAYS} ORDER BY seq LIMIT 1
) AS head
""")
_BEFORE: Final = text(f"""
SELECT behind, count(*) FROM jobs
WHERE {STAYS} AND (-priority, seq) < (-CAST(:priority AS int), CAST(:seq AS bigint)) GROUP BY behind
""")

#: Of each shape the rows between two neighbours of some orders, numbered from 0.
_BETWEEN: Final = text(f"""
SELECT behind, width_bucket(({TOP_PRIORITY} - priority) * {SUBMISSIONS} + seq, CAST(:orders AS bigint[])) AS part,
  count(*)
FROM jobs WHERE {STAYS} AND behind = ANY(CAST(:shapes AS text[])) AND (-priority, seq) < (:level, :seq)
GROUP BY behind, part
""")


def before(connection: Connection, priority: int, seq: int) -> dict[str, int]:
    """Count the jobs that stay in Postgres and come before a place, by the shape under which they are filed."""
    rows = connection.execute(_BEFORE, {"priority": priority, "seq": seq})
    return {row[0]: int(row[1]) for row in rows}


@dataclass(frozen=True, slots=True)
class Staying:
    """The jobs of a shape, or of one of its priorities, that stay in Postgres: their number, and the first of them.

    `first` and `last`: the orders of the first and the last job.
    """

    number: int
    job: str
    first: int
    last: int


def numbers(connection: Connection) -> dict[str, int]:
    """Return the number of jobs that stay in Postgres, by shape. The cost grows with their number."""
    rows = connection.execute(_NUMBERS)
    return {shape: int(number) for shape, number in rows if number > 0}


def ends(connection: Connection, numbers: Mapping[str, int]) -> dict[str, Staying]:
    """Return the first and the last job of shapes that stay in Postgres. The cost grows with the shapes alone.

    `numbers`: how many jobs each of these shapes has.
    """
    rows = connection.execute(_ENDS, {"shapes": list(numbers)}) if numbers else ()
    return {
        shape: Staying(numbers[shape], job, order(priority, seq), order(last_priority, last_seq))
        for shape, job, priority, seq, last_priority, last_seq in rows
    }


#: A shape and a priority.
Level = tuple[str, int]


def levels(connection: Connection, shapes: Sequence[str]) -> dict[Level, int]:
    """Return the number of jobs of these shapes that stay in Postgres, by shape and priority. It counts all of them."""
    rows = connection.execute(_LEVELS, {"shapes": list(shapes)}) if shapes else ()
    return {(shape, priority): int(number) for shape, priority, number in rows}


def firsts(connection: Connection, numbers: Mapping[Level, int]) -> list[tuple[str, Staying]]:
    """Return the first job of each of these levels that still has one. The cost grows with the levels alone.

    `numbers`: how many jobs each has. `last` is not read.
    """
    asked = list(numbers)
    values = {"shapes": [shape for shape, _ in asked], "priorities": [priority for _, priority in asked]}
    rows = connection.execute(_FIRSTS, values) if asked else ()
    return [
        (asked[number - 1][0], Staying(numbers[asked[number - 1]], job, order(priority, seq), order(priority, seq)))
        for number, job, priority, seq in rows
    ]


def before_each(
    connection: Connection, orders: Sequence[int], staying: Mapping[str, Staying]
) -> dict[int, dict[str, int]]:
    """Count the jobs that stay in Postgres and come before each of these orders, by shape, in one statement.

    `staying`: all of them. Only shapes with jobs on both sides of an order are counted.
    """
    thresholds = sorted(set(orders))
    counts: dict[int, dict[str, int]] = {threshold: {} for threshold in thresholds}
    divided = []
    for shape, jobs in staying.items():
        behind = bisect_right(thresholds, jobs.last)
        if bisect_right(thresholds, jobs.first) < behind:
            divided.append(shape)
            continue
        for threshold in thresholds[behind:]:
            counts[threshold][shape] = jobs.number
    if not divided:
        return counts
    level, seq = divmod(thresholds[-1], SUBMISSIONS)
    values = {"orders": thresholds, "shapes": divided, "level": level - TOP_PRIORITY, "seq": seq}
    for shape, part, number in connection.execute(_BETWEEN, values):
        for threshold in thresholds[part:]:
            counts[threshold][shape] = counts[threshold].get(shape, 0) + int(number)
    return counts
