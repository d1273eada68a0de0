"""Events of a job for its watchers: messages on the channel that has the name of the job's key.

Each script that changes a job publishes a message there. It costs a microsecond, with or without listeners. A channel
keeps nothing. So a watcher that begins to listen, or listens again after a gap, looks at the job first. A watcher also
looks at the job after an empty message, or a new epoch on `EPOCH_CHANNEL`: no script made that change, because Postgres
decided, or ended a job that the ledger does not know.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

import redis
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from celery_capacity.routing.database.postgres_errors import NOT_ALLOWED
from celery_capacity.routing.ledger import keys
from celery_capacity.routing.ledger.snapshot import TOMBSTONE, read_jobs
from celery_capacity.routing.model.states import FINAL, State, Step

#: Channel on which a new epoch is published.
EPOCH_CHANNEL: Final = keys.EPOCH

#: Rank of an event: (epoch, attempt, step). The rank of a job only grows.
Rank = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class JobEvent:
    """A job came into a `state`. `attempt`: the number of its admissions.

    `worker` and `at` may be None for a change that was over when the job was looked at.
    """

    job: str
    state: State
    attempt: int
    worker: str | None = None
    at: datetime | None = None
    rank: Rank = field(default=(0, 0, 0), repr=False)

    @property
    def final(self) -> bool:
        """Return whether the job has ended."""
        return self.state in FINAL

    def follows(self, other: JobEvent | None) -> bool:
        """Return whether this event is news after another one."""
        if other is None:
            return True
        return self.rank > other.rank and (self.state, self.attempt) != (other.state, other.attempt)


def channel(job: str) -> str:
    """Return the channel on which a job's events are published."""
    return keys.job(job)


def parse(job: str, message: bytes) -> JobEvent | None:
    """Parse a message of a job's channel; return None where the caller has to look at the job."""
    if not message:
        return None
    epoch, attempt, step, state, at, worker = message.decode("utf-8", "replace").split(" ", 5)
    rank = (int(epoch), int(attempt), int(step))
    when = datetime.fromtimestamp(int(at) / 1000, UTC)
    return JobEvent(job, State(state), int(attempt), worker or None, when, rank)


#: Step for each state in the ledger. A waiting job may have been filed or put back.
_STEPS: Final[dict[str | None, Step]] = {
    State.WAITING: Step.FILED,
    State.ADMITTED: Step.ADMITTED,
    State.RUNNING: Step.RUNNING,
}


def in_ledger(client: redis.Redis, job: str) -> JobEvent | None:
    """Return the state of a job in the ledger; None where the ledger does not know it."""
    fields = read_jobs(client, [job]).get(job, {})
    state, epoch, attempt, worker = map(fields.get, ("state", "epoch", "attempt", "worker"))
    if state == TOMBSTONE:
        state = fields.get("became")
        step = Step.DROPPED if state in FINAL else Step.BACK
    else:
        step = _STEPS.get(state, Step.NONE)
    if not state or epoch is None or attempt is None:
        return None
    return JobEvent(job, State(state), int(attempt), worker, rank=(int(epoch), int(attempt), step))


# A role that only submits may read these columns, but not the archive.
_ROW: Final = text("SELECT state, attempt, epoch, step FROM jobs WHERE id = :id")
_ARCHIVED: Final = text("SELECT state, attempt, epoch FROM jobs_archive WHERE id = :id ORDER BY seq DESC LIMIT 1")


def in_postgres(connection: Connection, job: str) -> JobEvent | None:
    """Return the state of a job in Postgres; None where there is no such job."""
    row = connection.execute(_ROW, {"id": job}).one_or_none()
    if row is not None:
        return JobEvent(job, State(row[0]), row[1], rank=(row[2], row[1], row[3]))
    try:
        gone = connection.execute(_ARCHIVED, {"id": job}).one_or_none()
    except DBAPIError as error:
        if getattr(error.orig, "pgcode", None) != NOT_ALLOWED:
            raise
        return None
    return None if gone is None else JobEvent(job, State(gone[0]), gone[1], rank=(gone[2], gone[1], Step.DROPPED))
