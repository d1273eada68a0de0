"""Publishes under an existing id: the successor of a running attempt, or the end of a replacement.

A publish is identified by (id, `retries`, `replaced_task_nesting`). A publish equal to the row's is there already, and
is ignored. A higher one is a successor. A message that its task puts back (`Reject(requeue=True)`) follows itself. Each
is one guarded statement on the caller's connection.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Final

from sqlalchemy import Connection, text

from celery_capacity.routing.errors import LeaseLost, Unsupported
from celery_capacity.routing.insert import columns
from celery_capacity.routing.insert.single import insert_job, may_publish
from celery_capacity.routing.model import outbox
from celery_capacity.routing.model.job import Existing, NewJob, Publisher
from celery_capacity.routing.model.states import FINAL, Outcome, State, Step
from celery_capacity.routing.model.token import Token

logger = logging.getLogger(__name__)

#: Seconds of the longest pause before a message that was put back is delivered again.
MAX_PAUSE: Final = 60
_FINAL: Final = ", ".join(f"'{state.value}'" for state in sorted(FINAL))


def _if_replaced(column: str, value: str) -> str:
    """Return SQL that sets a column of the row itself, where its attempt has ended by a replacement.

    The row then goes on with the publish; else the publish waits beside the row.
    """
    return f"{column} = CASE WHEN state = '{State.REPLACED.value}' THEN {value} ELSE {column} END"


def _unless_replaced(column: str, value: str) -> str:
    return f"{column} = CASE WHEN state <> '{State.REPLACED.value}' THEN {value} END"


# A single statement, so that Postgres itself looks again at a row that becomes `replaced` meanwhile.
_SUCCESSOR: Final = text(f"""
UPDATE jobs SET
  {_if_replaced("message", ":message")},
  {_if_replaced("name", ":name")},
  {_if_replaced("rerun", ":rerun")},
  {_if_replaced("shape", ":shape")},
  {_if_replaced("queue", ":queue")},
  {_if_replaced("request", "CAST(:request AS jsonb)")},
  {_if_replaced("expected_ms", ":expected_ms")},
  {_if_replaced("retries", ":retries")},
  {_if_replaced("nesting", ":nesting")},
  {_if_replaced("priority", "CASE WHEN reprioritized AND NOT :priority_given THEN priority ELSE :priority END")},
  {_if_replaced("key_limits", "CAST(:key_limits AS jsonb)")},
  {_if_replaced("due_at", "CASE WHEN CAST(:key_limits AS jsonb) IS NULL THEN CAST(:starts_at AS timestamptz) END")},
  {_if_replaced("not_before", "CAST(:starts_at AS timestamptz)")},
  {_if_replaced("expires_at", "CAST(:expires_at AS timestamptz)")},
  {_if_replaced("step", str(Step.BACK.value))},
  {_unless_replaced("successor", ":message")},
  {_unless_replaced("successor_shape", ":shape")},
  {_unless_replaced("successor_request", "CAST(:request AS jsonb)")},
  {_unless_replaced("successor_expected_ms", "CAST(:expected_ms AS bigint)")},
  {_unless_replaced("successor_name", "CAST(:name AS text)")},
  {_unless_replaced("successor_rerun", "CAST(:rerun AS bool)")},
  {_unless_replaced("successor_retries", "CAST(:retries AS int)")},
  {_unless_replaced("successor_nesting", "CAST(:nesting AS int)")},
  {_unless_replaced("successor_priority", "CAST(:priority AS smallint)")},
  {_unless_replaced("successor_key_limits", "CAST(:key_limits AS jsonb)")},
  {_unless_replaced("successor_due_at", "CAST(:starts_at AS timestamptz)")},
  {_unless_replaced("successor_expires_at", "CAST(:expires_at AS timestamptz)")},
  reprioritized = reprioritized AND NOT :priority_given,
  state = CASE WHEN state <> '{State.REPLACED.value}' THEN state
               WHEN CAST(:starts_at AS timestamptz) IS NULL AND CAST(:key_limits AS jsonb) IS NULL
               THEN '{State.ACCEPTED.value}'
               ELSE '{State.SCHEDULED.value}' END
WHERE id = :id AND state NOT IN ({_FINAL})
  AND (retries, nesting) < (:retries, :nesting)
  AND (CAST(:publisher AS int) IS NULL OR attempt <= CAST(:publisher AS int))
  AND (successor IS NULL OR (successor_retries, successor_nesting) < (:retries, :nesting))
RETURNING CASE WHEN successor IS NULL THEN '{State.REPLACED.value}' ELSE state END
""")


#: Columns of a job that its successor replaces, and those that tell one publish from another.
_COLUMNS: Final = (
    *("id", "message", "name", "rerun", "shape", "queue", "request", "retries", "nesting", "priority"),
    *("expires_at", "expected_ms", "key_limits"),
)


def put_successor(connection: Connection, job: NewJob) -> str | None:
    """Keep a publish under an existing id as the successor of its running attempt.

    A row whose attempt was replaced long ago goes on with the publish at once. A publish is identified by id, retries
    and nesting; an equal or lower one is there already. Returns the state that the row had, None where the publish is
    refused.
    """
    row = columns.row(job)
    publish = {"starts_at": job.due_at, "publisher": job.publisher, "priority_given": job.priority_given}
    values = {**{name: row[name] for name in _COLUMNS}, **publish}
    state = connection.execute(_SUCCESSOR, values).scalar_one_or_none()
    return str(state) if state is not None else None


_IDENTITY: Final = text("SELECT state, attempt, retries, nesting FROM jobs WHERE id = :id")


def publish_again(connection: Connection, job: NewJob, by: Publisher | None, *, tolerant: bool) -> Existing:
    """Publish a job under an existing id, and return what became of it.

    `tolerant`: the last step of a replacement whose job has ended is dropped, instead of refused. Raises `LeaseLost`
    where a newer attempt has the job, `Unsupported` where the job has ended.
    """
    if by is not None and not may_publish(connection, by):
        return Existing.STALE
    # A first publish is nobody's successor, and a role that only submits may not change a row.
    prior_state = put_successor(connection, job) if job.retries or job.nesting else None
    if prior_state == State.REPLACED:
        # The attempt ended long ago. This is the last step of its replacement, and the row goes on with it.
        return Existing.ACCEPTED if job.starts else Existing.IGNORED
    if prior_state is not None:
        return Existing.SUCCESSOR
    row = connection.execute(_IDENTITY, {"id": job.id}).one_or_none()
    if row is None:
        return Existing.IGNORED
    if job.publisher is not None and job.publisher < row.attempt:
        raise LeaseLost(
            f"attempt {job.publisher} of job {job.id} lost its lease to attempt {row.attempt}: what it publishes "
            "under the job's id is refused"
        )
    if row.state in FINAL and (row.retries, row.nesting) < (job.retries, job.nesting):
        if job.nesting > row.nesting and tolerant:
            # The job was revoked before the last step of its replacement, say. The step before is not to blame.
            logger.warning("job %s has ended as %s, the last step of its replacement is dropped", job.id, row.state)
            return Existing.IGNORED
        raise Unsupported(
            f"task id {job.id} has ended as {row.state}; it cannot be published again as a successor",
            value=job.id,
            advice="Use a new task_id.",
        )
    # An accepted job never reached the ledger, or came back from there.
    return Existing.ACCEPTED if row.state == State.ACCEPTED else Existing.IGNORED


def publish_left(connection: Connection, left: str) -> list[str]:
    """Insert the jobs that an attempt could not publish, before its outcome is written.

    Return the ids of new jobs that may start. A job that was inserted before is left as it is.
    """
    new = []
    for job in outbox.parse(left).publishes:
        inserted = insert_job(connection, job)
        if inserted.seq is not None:
            if inserted.starts:
                new.append(job.id)
        elif inserted.same_as is None and put_successor(connection, job) == State.REPLACED and job.starts:
            new.append(job.id)
    return new


# The first time there is no pause, then 1 s, 2 s, 4 s. Attempts that ended in another way are not counted.
# The row still has its attempt: the transition that ends it comes next, and keeps the time that is set here. A job that
# starts by a rate goes on under that rate again, not before this time. So does a job with limits by key. The
# link of a retry follows its new `seq`, and so do the rows of its keys, by a trigger. No other table has the `seq` of a
# running job: its rows in `dependencies` went before it started, only ended jobs are repeated, and only ended jobs go
# to the archive.
_PUT_BEHIND: Final = text(f"""
WITH x AS (
  SELECT j.id, j.seq, now() + make_interval(secs =>
    CASE WHEN before.times > 0 THEN least({MAX_PAUSE}, 2 ^ least(before.times - 1, 30)) ELSE 0 END) AS at
  FROM unnest(CAST(:job AS text[]), CAST(:epoch AS bigint[]), CAST(:attempt AS int[])) AS x (job, epoch, attempt)
  JOIN jobs j ON j.id = x.job
  CROSS JOIN LATERAL (SELECT count(*) AS times FROM attempts a WHERE a.job_id = j.id
    AND a.outcome = '{Outcome.REQUEUED.value}' AND (a.epoch, a.attempt) < (x.epoch, x.attempt)) AS before
  WHERE (j.epoch, j.attempt, j.step) < (x.epoch, x.attempt, {Step.BACK.value}) AND j.state NOT IN ({_FINAL})
    AND j.successor IS NULL
  ORDER BY j.id FOR NO KEY UPDATE OF j
), put AS (
  UPDATE jobs SET seq = DEFAULT, due_at = CASE WHEN NOT jobs.rated AND jobs.key_limits IS NULL THEN x.at END,
    not_before = CASE WHEN jobs.rated OR jobs.key_limits IS NOT NULL THEN x.at ELSE jobs.not_before END
  FROM x WHERE jobs.id = x.id RETURNING x.seq AS prior, jobs.seq AS next
)
UPDATE retries SET seq = put.next FROM put WHERE retries.seq = put.prior
""")


def put_behind(connection: Connection, requeued: Sequence[tuple[str, Token]]) -> None:
    """Give jobs that put themselves back, by these attempts, a place behind all others and the time of a next attempt.

    The pause grows with the number of times that a message was put back. Call it before the attempts end.
    """
    values = {
        "job": [job for job, _ in requeued],
        "epoch": [token.epoch for _, token in requeued],
        "attempt": [token.attempt for _, token in requeued],
    }
    connection.execute(_PUT_BEHIND, values)
