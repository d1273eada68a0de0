"""Healing times after faults, computed afterwards from the trace and the rows."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from typing import NamedTuple

from sqlalchemy import text

from tests.faults.judging.oracle import monotonic_of, read
from tests.faults.judging.watching import Oracle


class Times(NamedTuple):
    """Seconds from the end of a fault: to the first start of a body, and to the end of all jobs accepted before."""

    first: float | None
    all: float | None


def times_of(oracle: Oracle, faults: Iterable[tuple[str, float]]) -> dict[str, list[Times]]:
    """Return the healing times by kind of fault.

    `faults`: kind and end, by the monotonic clock. The second time of a fault includes the effects of later faults.
    """
    starts = sorted(line.at for line in read(oracle.trace) if line.what == "start")
    query = text(
        "SELECT (extract(epoch FROM submitted_at))::float8, (extract(epoch FROM finished_at))::float8 "
        "FROM jobs WHERE finished_at IS NOT NULL"
    )
    with oracle.platform.engine.connect() as connection:
        spans = [(monotonic_of(row[0]), monotonic_of(row[1])) for row in connection.execute(query)]
    times: dict[str, list[Times]] = {}
    for kind, ended in faults:
        index = bisect_right(starts, ended)
        first = starts[index] - ended if index < len(starts) else None
        open_then = [finished for submitted, finished in spans if submitted <= ended < finished]
        times.setdefault(kind, []).append(Times(first, max(open_then) - ended if open_then else 0.0))
    return times
