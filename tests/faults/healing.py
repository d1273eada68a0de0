"""How long it took until work went on after a fault, found out afterwards from the trace and the rows."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from typing import NamedTuple

from sqlalchemy import text

from tests.faults.oracle import monotonic_of, read
from tests.faults.watching import Oracle


class Times(NamedTuple):
    """Seconds from the end of a fault: to the first start of a body, and until all that was accepted before is over."""

    first: float | None
    all: float | None


def times_of(oracle: Oracle, faults: Iterable[tuple[str, float]]) -> dict[str, list[Times]]:
    """By kind. `faults`: kind and end, by the monotonic clock. (What broke later is in the second number too.)"""
    starts = sorted(line.at for line in read(oracle.trace) if line.what == "start")
    query = text(
        "SELECT (extract(epoch FROM submitted_at))::float8, (extract(epoch FROM finished_at))::float8 "
        "FROM jobs WHERE finished_at IS NOT NULL"
    )
    with oracle.platform.engine.connect() as connection:
        spans = [(monotonic_of(row[0]), monotonic_of(row[1])) for row in connection.execute(query)]
    found: dict[str, list[Times]] = {}
    for kind, ended in faults:
        index = bisect_right(starts, ended)
        first = starts[index] - ended if index < len(starts) else None
        open_then = [finished for submitted, finished in spans if submitted <= ended < finished]
        found.setdefault(kind, []).append(Times(first, max(open_then) - ended if open_then else 0.0))
    return found
