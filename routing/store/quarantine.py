"""Messages that nobody can read, set aside as they came, in the table `quarantine`.

Nothing in them is trusted. They are kept for a person who asks where they came from, and who drops them or has them
read again (`workers.client.requeue`). Only the newest `MAX_KEPT` are kept, so that a flood of such messages does not
fill the database.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Final

from sqlalchemy import Connection, delete, insert, text

from celery_capacity.routing.database.schema import quarantine
from celery_capacity.routing.errors import storable
from celery_capacity.routing.model.amounts import QUEUES
from celery_capacity.routing.model.reasons import Refusal
from celery_capacity.routing.model.states import WorkerStatus

#: Bytes of a message that are kept.
MAX_BYTES: Final = 1024**2
#: Messages that are kept.
MAX_KEPT: Final = 1000
#: Characters of a reason with its detail, and of the name of a queue.
REASON_LENGTH: Final = 500
QUEUE_LENGTH: Final = 255
#: Words of the reasons for which a transition or an outbox is set aside; all others are of messages.
TRANSITIONS: Final = frozenset(
    refusal.word for refusal in (Refusal.NO_TRANSITION, Refusal.UNWRITABLE, Refusal.UNREADABLE_OUTBOX)
)
#: Reasons that are shown to people, with the number of messages.
SHOWN: Final = 5


@dataclass(frozen=True, slots=True)
class SetAside:
    """A message that was set aside: its bytes (cut), its queue, and the reason. `worker`: its receiver.

    The reason is "<word of a Refusal>: <detail>", so that equal reasons can be counted whatever the detail.
    """

    raw: bytes
    queue: str
    reason: str
    worker: str | None = None
    #: Time by Postgres at which a kept message was set aside.
    seen_at: datetime | None = None

    @classmethod
    def of(cls, raw: bytes, queue: str, reason: Refusal, detail: str, worker: str | None = None) -> SetAside:
        """Make a row of the table: cut each value to its limit, and keep only characters that Postgres stores."""
        text = storable(f"{reason.word}: {detail}", REASON_LENGTH)
        return cls(bytes(raw[:MAX_BYTES]), storable(queue, QUEUE_LENGTH), text, worker)

    @property
    def is_transition(self) -> bool:
        """Return True for a transition or an outbox.

        The platform alone writes the word of the reason. Queue and bytes may be a sender's choice.
        """
        return self.reason.partition(":")[0] in TRANSITIONS


@dataclass(frozen=True, slots=True)
class ReasonCount:
    """Messages of a queue that were set aside for one reason.

    `reason`: the word of a `Refusal`; `detail`: of the newest message. `messages`: of those kept; `seen_at`: the last
    time.
    """

    reason: str
    detail: str
    queue: str
    messages: int
    seen_at: datetime

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "seen_at": self.seen_at.astimezone(UTC).isoformat(timespec="milliseconds")}


@dataclass(frozen=True, slots=True)
class Quarantined:
    """The number of all messages set aside so far, and the newest reasons."""

    messages: int
    reasons: tuple[ReasonCount, ...]

    def to_json(self) -> dict[str, Any]:
        return {"messages": self.messages, "reasons": [reason.to_json() for reason in self.reasons]}


def write(connection: Connection, messages: Sequence[SetAside]) -> None:
    """Store these messages, and delete all but the newest `MAX_KEPT`."""
    newest = connection.execute(
        insert(quarantine).returning(quarantine.c.id),
        [
            {"raw": message.raw, "queue": message.queue, "reason": message.reason, "worker": message.worker}
            for message in messages
        ],
    ).scalars()
    connection.execute(delete(quarantine).where(quarantine.c.id <= max(newest) - MAX_KEPT))


_KNOWN: Final = text("""
SELECT id FROM unnest(CAST(:ids AS text[])) AS id
WHERE EXISTS (SELECT 1 FROM jobs WHERE jobs.id = id.id) OR EXISTS (SELECT 1 FROM jobs_archive a WHERE a.id = id.id)
""")


def known(connection: Connection, jobs: Sequence[str]) -> set[str]:
    """Return those of these ids that are, or were, ids of jobs."""
    return set(connection.execute(_KNOWN, {"ids": list(jobs)}).scalars()) if jobs else set()


_COUNTS: Final = text("""
SELECT split_part(reason, ': ', 1) AS word,
  (array_agg(substr(reason, length(split_part(reason, ': ', 1)) + 3) ORDER BY id DESC))[1] AS detail,
  queue, count(*) AS messages, max(seen_at) AS seen_at
FROM quarantine GROUP BY word, queue ORDER BY max(seen_at) DESC, max(id) DESC LIMIT :shown
""")


#: The newest id is the number of messages, since ids are assigned in order, one for each. Once its row is dropped, only
#: the sequence knows it. A role that lacks the right to read the sequence has the largest id that is kept.
_NUMBER: Final = text("""
SELECT greatest(
  coalesce((SELECT max(id) FROM quarantine), 0),
  CASE WHEN has_sequence_privilege(name, 'SELECT') THEN pg_sequence_last_value(name::regclass) END
) FROM pg_get_serial_sequence('quarantine', 'id') AS name
""")


def read(connection: Connection, shown: int = SHOWN) -> Quarantined:
    """Return the number of all messages that were ever set aside, and the newest `shown` reasons of those kept."""
    last = connection.execute(_NUMBER).scalar_one()
    counts = connection.execute(_COUNTS, {"shown": shown})
    return Quarantined(int(last), tuple(ReasonCount(*row) for row in counts))


_LIST: Final = text("""
SELECT id, queue, reason, worker, seen_at FROM quarantine WHERE id < :before ORDER BY id DESC LIMIT :limit
""")


def newest(connection: Connection, limit: int, before: int) -> list[dict[str, Any]]:
    """Return messages that are kept, the newest first, without their bytes. `before`: the id of the last one seen."""
    rows = connection.execute(_LIST, {"limit": limit, "before": before}).mappings()
    return [{**row, "seen_at": row["seen_at"].astimezone(UTC).isoformat(timespec="milliseconds")} for row in rows]


def drop(connection: Connection, ids: Sequence[int]) -> int:
    """Delete messages by their ids; return the number of those that were there."""
    return connection.execute(delete(quarantine).where(quarantine.c.id.in_(ids))).rowcount


_TAKE: Final = text("DELETE FROM quarantine WHERE id = :id RETURNING raw, queue, reason, worker, seen_at")


def take(connection: Connection, message: int) -> SetAside | None:
    """Delete a message in the caller's transaction, and return it; None where there is none.

    Until the end of the transaction nobody else takes it. After a rollback it is there as before.
    """
    row = connection.execute(_TAKE, {"id": message}).one_or_none()
    return None if row is None else SetAside(bytes(row.raw), *row[1:])


_SERVED: Final = text(f"""
SELECT EXISTS (SELECT 1 FROM workers WHERE status IN ('{WorkerStatus.READY.value}', '{WorkerStatus.DRAINING.value}')
  AND jsonb_exists(CAST(capacity AS jsonb) -> '{QUEUES}', :queue))
""")


def is_served(connection: Connection, queue: str) -> bool:
    """Return True if a worker that has not left serves this queue, besides the default one."""
    return bool(connection.execute(_SERVED, {"queue": queue}).scalar_one())
