"""Workers that are missing: lost, or without a heartbeat for so long that they soon count as lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC
from typing import Any, Final

from sqlalchemy import Connection, text

#: Seconds for which a lost worker is shown, unless one of its name came again: a day.
SHOWN_FOR: Final = 86400.0
#: Most workers that are read, those that went last.
MAX_MISSING: Final = 200

# A worker that was shut down has left, and is not missing.
_MISSING: Final = text("""
SELECT name, status, hostname, coalesce(left_at, seen_at) AS since FROM workers AS gone
WHERE (status = 'lost' AND left_at > clock_timestamp() - make_interval(secs => :shown_for)
    OR status IN ('ready', 'draining') AND seen_at < clock_timestamp() - make_interval(secs => :ttl))
  AND NOT EXISTS (SELECT 1 FROM workers AS next WHERE next.name = gone.name AND next.started_at > gone.started_at)
ORDER BY since DESC, name LIMIT :most
""")


def read(connection: Connection, ttl: float) -> list[dict[str, Any]]:
    """Return the missing workers, the one that went last first. `ttl`: seconds until a silent worker is suspect."""
    values = {"shown_for": SHOWN_FOR, "ttl": ttl, "most": MAX_MISSING}
    return [
        {
            "name": row.name,
            "status": "lost" if row.status == "lost" else "suspect",
            "hostname": row.hostname,
            "since": row.since.astimezone(UTC).isoformat(timespec="milliseconds"),
        }
        for row in connection.execute(_MISSING, values)
    ]


def without_live(missing: Sequence[dict[str, Any]], workers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the missing workers without those that live: the row of a live worker may be late."""
    live = {worker["name"] for worker in workers}
    return [worker for worker in missing if worker["name"] not in live]
