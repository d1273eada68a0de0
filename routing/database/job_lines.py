"""Lines of a job's own log: written in batches, of each job the newest, and read by people.

The lines of an attempt are numbered from 1 on. A missing number is a line that was lost while Postgres was away, or one
that is not kept any more. A batch that is written again changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, text

from celery_capacity.routing.config.redaction import hidden_lines
from celery_capacity.routing.errors import storable

#: Characters of a message that are kept, and of the name of a logger.
MESSAGE_LENGTH: Final = 2000
NAME_LENGTH: Final = 200


class Position(NamedTuple):
    """Position of a line among those of its job."""

    epoch: int
    attempt: int
    number: int


@dataclass(frozen=True, slots=True)
class JobLine:
    """Line that the body of an attempt wrote. `number`: from 1 on in the attempt."""

    job: str
    epoch: int
    attempt: int
    number: int
    time: datetime
    level: str
    logger: str
    message: str

    @property
    def position(self) -> Position:
        return Position(self.epoch, self.attempt, self.number)

    def to_json(self) -> dict[str, Any]:
        """Return the object that `logs --json` prints."""
        return {**asdict(self), "time": self.time.isoformat(timespec="milliseconds")}


_COLUMNS: Final = ("job", "epoch", "attempt", "number", "time", "level", "logger", "message")

# A job that has gone into the archive meanwhile takes no line. The lock keeps a job from moving there between this look
# and the commit: `archive_finished` skips locked rows, and deletes only the lines that it sees.
_INSERT: Final = text("""
WITH kept AS MATERIALIZED (
  SELECT id, seq FROM jobs WHERE id = ANY(CAST(:job AS text[])) ORDER BY id FOR KEY SHARE
)
INSERT INTO job_lines (job_seq, epoch, attempt, number, logged_at, level, logger, message)
SELECT j.seq, l.epoch, l.attempt, l.number, l.time, l.level, l.logger, l.message
FROM unnest(CAST(:job AS text[]), CAST(:epoch AS bigint[]), CAST(:attempt AS int[]), CAST(:number AS bigint[]),
            CAST(:time AS timestamptz[]), CAST(:level AS text[]), CAST(:logger AS text[]), CAST(:message AS text[]))
  AS l (job, epoch, attempt, number, time, level, logger, message)
JOIN kept j ON j.id = l.job
ON CONFLICT DO NOTHING
""")

_TRIM: Final = text("""
DELETE FROM job_lines d USING (
  SELECT j.seq, o.epoch, o.attempt, o.number FROM jobs j CROSS JOIN LATERAL (
    SELECT epoch, attempt, number FROM job_lines WHERE job_seq = j.seq
    ORDER BY epoch DESC, attempt DESC, number DESC OFFSET :keep LIMIT 1
  ) o WHERE j.id = ANY(CAST(:jobs AS text[]))
) b
WHERE d.job_seq = b.seq AND (d.epoch, d.attempt, d.number) <= (b.epoch, b.attempt, b.number)
""")


def write(connection: Connection, lines: Sequence[JobLine], keep: int) -> None:
    """Write lines, with secrets hidden, and of each of their jobs delete all but the newest `keep`."""
    values: dict[str, list[Any]] = {name: [getattr(line, name) for line in lines] for name in _COLUMNS}
    values["message"] = [storable(hidden_lines(message), MESSAGE_LENGTH) for message in values["message"]]
    for name in ("level", "logger"):
        values[name] = [storable(word, NAME_LENGTH) for word in values[name]]
    connection.execute(_INSERT, values)
    # The lines of a first attempt are counted by their numbers.
    long = {line.job for line in lines if line.number > keep or line.attempt > 1}
    if long:
        connection.execute(_TRIM, {"jobs": sorted(long), "keep": keep})


def _reading(condition: str, order: str) -> Any:
    return text(f"""
SELECT CAST(:job AS text) AS job, epoch, attempt, number, logged_at, level, logger, message FROM job_lines
WHERE job_seq = (SELECT seq FROM jobs WHERE id = :job)
  AND (CAST(:attempt AS int) IS NULL OR attempt = :attempt){condition}
ORDER BY epoch {order}, attempt {order}, number {order} LIMIT :most
""")


_NEWEST: Final = _reading("", "DESC")
_AFTER: Final = _reading(" AND (epoch, attempt, number) > (:after_epoch, :after_attempt, :after_number)", "ASC")


def read(
    connection: Connection, job: str, most: int, attempt: int | None = None, after: Position | None = None
) -> list[JobLine]:
    """Return lines of a job in their order: the newest, or those that follow the position `after`; at most `most`."""
    values = {"job": job, "attempt": attempt, "most": most}
    if after is None:
        rows = connection.execute(_NEWEST, values).all()[::-1]
    else:
        bounds = {"after_epoch": after.epoch, "after_attempt": after.attempt, "after_number": after.number}
        rows = list(connection.execute(_AFTER, {**values, **bounds}))
    return [JobLine(*row) for row in rows]
