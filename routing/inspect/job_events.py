"""What becomes of a job, as whoever watches it hears it: a message on the channel that has the name of the job's key.

Each script that changes a job tells it there, at the price of a microsecond, heard or not. A channel keeps nothing: so
whoever begins to listen, or does so again after a gap, looks at the job first. The same holds for what no script did
(Postgres decided, or ended a job that the ledger does not know): then the message is empty, or a new epoch is told on
`EPOCH_CHANNEL`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

import redis
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from celery_capacity.routing.database.postgres import NOT_ALLOWED
from celery_capacity.routing.ledger import keys
from celery_capacity.routing.model.states import FINAL, State, Step

#: Where a new epoch is told.
EPOCH_CHANNEL: Final = keys.EPOCH

#: (epoch, attempt, step): it only grows.
Rank = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class JobEvent:
    """A job came into a `state`. `attempt`: how many admissions it has had. `worker` and `at`: where they are known (of
    what was over when it was looked at, they may not be)."""

    job: str
    state: State
    attempt: int
    worker: str | None = None
    at: datetime | None = None
    rank: Rank = field(default=(0, 0, 0), repr=False)

    @property
    def final(self) -> bool:
        """Whether the job has ended."""
        return self.state in FINAL

    def follows(self, other: JobEvent | None) -> bool:
        """Whether it is news after another one."""
        if other is None:
            return True
        return self.rank > other.rank and (self.state, self.attempt) != (other.state, other.attempt)


def channel(job: str) -> str:
    """Where a job's events are told."""
    return keys.job(job)


def parse(job: str, said: bytes) -> JobEvent | None:
    """A message of a job's channel; None: look at the job."""
    if not said:
        return None
    epoch, attempt, step, state, at, worker = said.decode("utf-8", "replace").split(" ", 5)
    rank = (int(epoch), int(attempt), int(step))
    when = datetime.fromtimestamp(int(at) / 1000, UTC)
    return JobEvent(job, State(state), int(attempt), worker or None, when, rank)


#: Of what the ledger says of a job; of one that waits, it may have been filed or put back.
_STEPS: Final = {"waiting": Step.FILED, "admitted": Step.ADMITTED, "running": Step.RUNNING}


def in_ledger(client: redis.Redis, job: str) -> JobEvent | None:
    """What the ledger knows of a job; None where that is nothing."""
    found: Any = client.hmget(keys.job(job), "state", "epoch", "attempt", "worker", "became")
    state, epoch, attempt, worker, became = (None if value is None else value.decode() for value in found)
    if state == "ended":
        state, step = became, Step.DROPPED if became in FINAL else Step.BACK
    else:
        step = _STEPS.get(state or "", Step.NONE)
    if not state or epoch is None or attempt is None:
        return None
    return JobEvent(job, State(state), int(attempt), worker, rank=(int(epoch), int(attempt), step))


# (Whoever only submits may read these columns, and no archive.)
_ROW: Final = text("SELECT state, attempt, epoch, step FROM jobs WHERE id = :id")
_ARCHIVED: Final = text("SELECT state, attempt, epoch FROM jobs_archive WHERE id = :id ORDER BY seq DESC LIMIT 1")


def in_postgres(connection: Connection, job: str) -> JobEvent | None:
    """What Postgres knows of a job; None where there is none."""
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
