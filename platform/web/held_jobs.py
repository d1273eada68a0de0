"""Jobs that workers hold, by worker, for the segments of their bars."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Final

from sqlalchemy import Connection, text

#: Most jobs that are read, those of the first of the workers by name.
MAX_JOBS: Final = 5000

_HELD: Final = text("""
SELECT worker, id, name, state, request, coalesce(started_at, admitted_at, submitted_at) AS since
FROM jobs WHERE state IN ('admitted', 'running') AND worker = ANY(CAST(:workers AS text[]))
ORDER BY worker, seq LIMIT :most
""")


def read(connection: Connection, workers: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Return the jobs that each of these workers holds, oldest first.

    Each has its id, task, state, request in people's units, and since when the worker holds it.
    """
    held: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in connection.execute(_HELD, {"workers": list(workers), "most": MAX_JOBS}):
        job = {"id": row.id, "name": row.name, "state": row.state, "request": row.request, "since": row.since}
        held[row.worker].append(job)
    return dict(held)
