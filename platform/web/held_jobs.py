"""Jobs that workers hold, by worker, for the segments of their bars."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, Final

from sqlalchemy import Connection, text

#: Most jobs that are read, those of the first workers by name.
MAX_JOBS: Final = 5000

_HELD: Final = text("""
SELECT worker, id, name, state, request, coalesce(started_at, admitted_at, submitted_at) AS since
FROM jobs WHERE state IN ('admitted', 'running') ORDER BY worker, seq LIMIT :most
""")


def read(connection: Connection) -> dict[str, list[dict[str, Any]]]:
    """Return the jobs that each worker holds, oldest first: id, task, state, request in people's units, and since."""
    held: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in connection.execute(_HELD, {"most": MAX_JOBS}):
        job = {"id": row.id, "name": row.name, "state": row.state, "request": row.request, "since": row.since}
        held[row.worker].append(job)
    return dict(held)
