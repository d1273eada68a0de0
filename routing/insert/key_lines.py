"""Jobs that wait for keys, as people see them: the key that holds a job back, and the keys that most jobs wait for."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Final

from sqlalchemy import Connection, text

#: Holders of a key that an explanation names.
SHOWN_HOLDERS: Final = 10
#: Keys that an overview names.
SHOWN_KEYS: Final = 20
#: Keys and waiting jobs of each that an overview looks at.
MAX_KEYS: Final = 200
MAX_COUNTED: Final = 10_000


@dataclass(frozen=True, slots=True)
class HeldBy:
    """The key that holds a job back.

    `limit`: the job starts while fewer jobs hold the key. `rate`: the starts of the key, as somebody wrote it, and
    `next_at`: the next of them. `holding`: number of jobs that hold the key, some of which are `holders`.
    `place_in_line`: from 1, among the waiting jobs with equal limits.
    """

    key: str
    limit: int | None
    rate: str | None
    holding: int
    holders: tuple[str, ...]
    place_in_line: int
    next_at: datetime | None

    def to_json(self) -> dict[str, Any]:
        next_at = None if self.next_at is None else self.next_at.astimezone(UTC).isoformat()
        return {**asdict(self), "holders": list(self.holders), "next_at": next_at}


@dataclass(frozen=True, slots=True)
class KeyLine:
    """A key for which jobs wait. `waiting`: at most `MAX_COUNTED`, where more wait. `more`: True if more wait."""

    key: str
    holding: int
    waiting: int
    more: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


# The full key comes first, then the one whose rate has no start left, then any.
_HELD_BY: Final = text("""
SELECT k.key, k.most, j.key_limits -> k.key ->> 'said' AS said, h.holding,
  CASE WHEN k.per_second IS NOT NULL AND r.next_at > now() THEN r.next_at END AS next_at, k.line
FROM job_keys k JOIN jobs j ON j.id = k.job LEFT JOIN key_rates r ON r.key = k.key
CROSS JOIN LATERAL (SELECT count(*) AS holding FROM job_keys o WHERE o.key = k.key AND o.phase = 'holds') h
WHERE k.job = :job AND k.phase = 'waits'
ORDER BY (k.most IS NOT NULL AND h.holding >= k.most) DESC,
  (k.per_second IS NOT NULL AND coalesce(r.next_at > now(), false)) DESC, k.number LIMIT 1
""")
_HOLDERS: Final = text("SELECT job FROM job_keys WHERE key = :key AND phase = 'holds' ORDER BY seq LIMIT :most")
_NUMBER: Final = text("""
SELECT count(*) FROM job_keys k JOIN job_keys o ON o.line = k.line AND o.phase = 'waits' AND o.number = 1
  AND ((- o.priority), o.seq) <= ((- k.priority), k.seq)
WHERE k.job = :job AND k.number = 1
""")
# Takes one step along the index for each key, however many jobs wait for it.
_KEYS: Final = text("""
WITH RECURSIVE keys AS (
  (SELECT key, 1 AS n FROM job_keys WHERE phase = 'waits' ORDER BY key LIMIT 1)
  UNION ALL
  SELECT following.key, keys.n + 1 FROM keys CROSS JOIN LATERAL (
    SELECT k.key FROM job_keys k WHERE k.phase = 'waits' AND k.key > keys.key ORDER BY k.key LIMIT 1
  ) AS following WHERE keys.n < :keys
)
SELECT keys.key, (SELECT count(*) FROM job_keys h WHERE h.key = keys.key AND h.phase = 'holds'),
  (SELECT count(*) FROM (SELECT FROM job_keys w WHERE w.key = keys.key AND w.phase = 'waits' LIMIT :counted) AS w)
FROM keys
""")


def held_by(connection: Connection, job: str) -> HeldBy | None:
    """Return the key that holds a job back, None where none does."""
    row = connection.execute(_HELD_BY, {"job": job}).one_or_none()
    if row is None:
        return None
    holders = connection.execute(_HOLDERS, {"key": row.key, "most": SHOWN_HOLDERS}).scalars()
    number = connection.execute(_NUMBER, {"job": job}).scalar_one()
    return HeldBy(row.key, row.most, row.said, row.holding, tuple(holders), number, row.next_at)


def waited_for(connection: Connection) -> tuple[KeyLine, ...]:
    """Return the keys for which jobs wait, those with the most waiting jobs first."""
    rows = connection.execute(_KEYS, {"keys": MAX_KEYS, "counted": MAX_COUNTED + 1})
    lines = [KeyLine(key, held, min(waiting, MAX_COUNTED), waiting > MAX_COUNTED) for key, held, waiting in rows]
    return tuple(sorted(lines, key=lambda line: (-line.waiting, line.key))[:SHOWN_KEYS])
