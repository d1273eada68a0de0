"""The jobs in Postgres: each function is one guarded statement on the caller's connection.

State and token stand in the WHERE of every write: `(epoch, attempt, step)` only grows, and a final state has no exit.
Statements are autocommitted one by one unless the caller opened a transaction.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import lru_cache
from typing import Any, Final

import psycopg2
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from routing import roster
from routing.errors import NotMigrated, storable
from routing.request import Request
from routing.states import FINAL, State, Step

#: Characters of an error that a row keeps.
ERROR_LENGTH: Final = 8000
_FINAL: Final = ", ".join(f"'{state.value}'" for state in sorted(FINAL))


@lru_cache(maxsize=4096)
def request_json(shape: str) -> str:
    """The column `request`: the shape in people's units, as JSON."""
    return json.dumps(Request.from_shape(shape).to_people())


@dataclass(frozen=True, slots=True)
class NewJob:
    """A job as it is submitted. `message` as `routing.message` makes it."""

    id: str
    name: str
    shape: str
    message: bytes
    priority: int = 0
    declared: bool = True
    queue: str = "celery"
    retries: int = 0
    nesting: int = 0
    #: The attempt of the same job that publishes this (a retry); None where nobody says.
    publisher: int | None = None
    root_id: str | None = None
    parent_id: str | None = None
    due_at: datetime | None = None
    expires_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Inserted:
    """`seq`: the order of submission; None where the id existed. `epoch`, `authority`: as confirmed by this insert."""

    seq: int | None
    epoch: int
    authority: str


@dataclass(frozen=True, slots=True)
class Transition:
    """One step of a job, as an entry of the stream says it; times in milliseconds, '' and 0 mean none."""

    job: str
    epoch: int
    attempt: int
    state: str
    step: int
    worker: str
    incarnation: str
    admitted_ms: int
    started_ms: int
    at_ms: int
    losses: int
    outcome: str = ""
    error: str = ""
    entry: str = ""

    @property
    def rank(self) -> tuple[int, int, int]:
        return self.epoch, self.attempt, self.step


# The hot path of every submit: prepared once for each connection, which halves its cost in Postgres.
_PREPARED: Final = "celery_capacity_insert_job"
_PREPARE: Final = f"""
PREPARE {_PREPARED} (text, text, text, text, jsonb, bytea, smallint, bool, text, int, int, text, text, timestamptz,
                     timestamptz) AS
INSERT INTO jobs (id, name, state, shape, request, message, priority, declared, queue, retries, nesting,
                  root_id, parent_id, due_at, expires_at)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15)
ON CONFLICT (id) DO NOTHING
RETURNING seq, (SELECT epoch FROM authority), (SELECT authority FROM authority)
"""
_EXECUTE: Final = f"EXECUTE {_PREPARED} (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)"
#: SQLSTATEs: a table is missing; a prepared statement is not known (a pooler gave us another session).
_UNDEFINED_TABLE: Final = "42P01"
_NOT_PREPARED: Final = "26000"


def insert_job(connection: Connection, job: NewJob) -> Inserted:
    """Make a job durable; an id that exists is left as it is (`seq` is None). Raises `NotMigrated`."""
    state = State.SCHEDULED if job.due_at is not None else State.ACCEPTED
    values = (
        job.id,
        job.name,
        state.value,
        job.shape,
        request_json(job.shape),
        job.message,
        job.priority,
        job.declared,
        job.queue,
        job.retries,
        job.nesting,
        job.root_id,
        job.parent_id,
        job.due_at,
        job.expires_at,
    )
    try:
        row = _execute_insert(connection, values)
    except DBAPIError as error:
        if getattr(error.orig, "pgcode", None) == _UNDEFINED_TABLE:
            raise NotMigrated() from error
        raise
    if row is None:
        known = roster.read_authority(connection)
        return Inserted(None, known.epoch, known.authority)
    if row[1] is None:
        raise NotMigrated()
    return Inserted(row[0], row[1], row[2])


def _execute_insert(connection: Connection, values: tuple[Any, ...]) -> Any:
    """The row that the insert returns. With the driver's own cursor: SQLAlchemy's result machinery would be a fifth of
    the whole statement. Errors are SQLAlchemy's, and a connection that broke is given up, as it would do."""
    cursor = connection.connection.cursor()
    try:
        # SQLAlchemy keeps `info` with the connection to the server, for as long as that lives.
        if _PREPARED not in connection.info:
            cursor.execute(_PREPARE)
            connection.info[_PREPARED] = True
        try:
            cursor.execute(_EXECUTE, values)
        except psycopg2.Error as error:
            if error.pgcode != _NOT_PREPARED:
                raise
            cursor.execute(_PREPARE)
            cursor.execute(_EXECUTE, values)
        return cursor.fetchone()
    except psycopg2.Error as error:
        broken = bool(getattr(connection.connection.driver_connection, "closed", 0))
        if broken:
            connection.invalidate(error)
        raise DBAPIError.instance(
            _EXECUTE, None, error, psycopg2.Error, hide_parameters=True, connection_invalidated=broken
        ) from error
    finally:
        cursor.close()


_SUCCESSOR: Final = text(f"""
UPDATE jobs SET successor = :message, successor_shape = :shape, successor_request = CAST(:request AS jsonb),
  successor_retries = :retries, successor_nesting = :nesting, successor_priority = :priority,
  successor_due_at = :due_at, successor_expires_at = :expires_at
WHERE id = :id AND state NOT IN ({_FINAL})
  AND (retries, nesting) < (:retries, :nesting)
  AND (CAST(:publisher AS int) IS NULL OR attempt <= CAST(:publisher AS int))
  AND (successor IS NULL OR (successor_retries, successor_nesting) < (:retries, :nesting))
RETURNING state
""")


def put_successor(connection: Connection, job: NewJob) -> str | None:
    """Keep a publish under an existing id as the successor of its running attempt (DESIGN: a publish is identified by
    id, retries and nesting; equal or lower is there already). Returns the state of the row, None where refused."""
    found = connection.execute(
        _SUCCESSOR,
        {
            "id": job.id,
            "message": job.message,
            "shape": job.shape,
            "request": request_json(job.shape),
            "retries": job.retries,
            "publisher": job.publisher,
            "nesting": job.nesting,
            "priority": job.priority,
            "due_at": job.due_at,
            "expires_at": job.expires_at,
        },
    ).scalar_one_or_none()
    return str(found) if found is not None else None


# A row says what its newest transition says, so the order and the batches in which they come make no difference; what
# was before is in `attempts`. An attempt that ends while its row holds a successor does not end the job: it runs.
_APPLY: Final = text(f"""
WITH e AS (
  SELECT * FROM unnest(CAST(:job AS text[]), CAST(:epoch AS bigint[]), CAST(:attempt AS int[]),
    CAST(:state AS text[]), CAST(:step AS smallint[]), CAST(:worker AS text[]), CAST(:incarnation AS text[]),
    CAST(:admitted AS bigint[]), CAST(:started AS bigint[]), CAST(:at AS bigint[]), CAST(:losses AS smallint[]),
    CAST(:error AS text[]))
  AS e (job, epoch, attempt, state, step, worker, incarnation, admitted, started, at, losses, error)
), a AS (
  INSERT INTO attempts (job_id, epoch, attempt, worker, incarnation, admitted_at, started_at, ended_at, outcome, error)
  SELECT x.job, x.epoch, x.attempt, x.worker, x.incarnation, to_timestamp(nullif(x.admitted, 0) / 1000.0),
    to_timestamp(nullif(x.started, 0) / 1000.0), to_timestamp(nullif(x.ended, 0) / 1000.0), nullif(x.outcome, ''),
    nullif(x.error, '')
  FROM unnest(CAST(:a_job AS text[]), CAST(:a_epoch AS bigint[]), CAST(:a_attempt AS int[]),
    CAST(:a_worker AS text[]), CAST(:a_incarnation AS text[]), CAST(:a_admitted AS bigint[]),
    CAST(:a_started AS bigint[]), CAST(:a_ended AS bigint[]), CAST(:a_outcome AS text[]), CAST(:a_error AS text[]))
  AS x (job, epoch, attempt, worker, incarnation, admitted, started, ended, outcome, error)
  ON CONFLICT (job_id, epoch, attempt) DO UPDATE SET
    admitted_at = coalesce(attempts.admitted_at, excluded.admitted_at),
    started_at = coalesce(attempts.started_at, excluded.started_at),
    ended_at = coalesce(attempts.ended_at, excluded.ended_at),
    outcome = coalesce(attempts.outcome, excluded.outcome),
    error = coalesce(attempts.error, excluded.error)
), j AS (
  SELECT jobs.id, jobs.successor IS NOT NULL AND e.step IN ({Step.ENDED.value}, {Step.BACK.value})
      AND e.state <> '{State.CANCELLED.value}' AS goes_on
  FROM jobs JOIN e ON jobs.id = e.job
  WHERE (jobs.epoch, jobs.attempt, jobs.step) < (e.epoch, e.attempt, e.step) AND jobs.state NOT IN ({_FINAL})
  ORDER BY jobs.id FOR UPDATE OF jobs
)
UPDATE jobs SET
  state = CASE WHEN goes_on THEN '{State.SCHEDULED.value}' ELSE e.state END,
  epoch = e.epoch, attempt = e.attempt, step = CASE WHEN goes_on THEN {Step.BACK.value} ELSE e.step END,
  losses = greatest(jobs.losses, e.losses),
  worker = nullif(e.worker, ''), incarnation = nullif(e.incarnation, ''),
  admitted_at = to_timestamp(nullif(e.admitted, 0) / 1000.0),
  started_at = to_timestamp(nullif(e.started, 0) / 1000.0),
  finished_at = CASE WHEN NOT goes_on AND e.state IN ({_FINAL}) THEN to_timestamp(e.at / 1000.0) END,
  error = nullif(e.error, ''),
  due_at = CASE WHEN goes_on THEN coalesce(jobs.successor_due_at, now())
                WHEN e.state = '{State.SCHEDULED.value}' THEN coalesce(jobs.due_at, now()) ELSE jobs.due_at END,
  message = CASE WHEN goes_on THEN jobs.successor ELSE jobs.message END,
  shape = CASE WHEN goes_on THEN jobs.successor_shape ELSE jobs.shape END,
  request = CASE WHEN goes_on THEN jobs.successor_request ELSE jobs.request END,
  retries = CASE WHEN goes_on THEN jobs.successor_retries ELSE jobs.retries END,
  nesting = CASE WHEN goes_on THEN jobs.successor_nesting ELSE jobs.nesting END,
  priority = CASE WHEN goes_on THEN jobs.successor_priority ELSE jobs.priority END,
  expires_at = CASE WHEN goes_on THEN jobs.successor_expires_at ELSE jobs.expires_at END,
  successor = CASE WHEN goes_on THEN NULL ELSE jobs.successor END,
  successor_retries = CASE WHEN goes_on THEN NULL ELSE jobs.successor_retries END,
  successor_nesting = CASE WHEN goes_on THEN NULL ELSE jobs.successor_nesting END
FROM e JOIN j ON j.id = e.job
WHERE jobs.id = e.job
RETURNING jobs.id, jobs.state, coalesce(jobs.due_at <= now(), false)
""")


@dataclass(frozen=True, slots=True)
class Applied:
    """A row that a transition changed. `due`: it is scheduled, and its time has come."""

    job: str
    state: str
    due: bool


def _newest(transitions: Iterable[Transition]) -> list[Transition]:
    """One transition for each job, the newest, in the order of ids (so that two writers lock in the same order)."""
    newest: dict[str, Transition] = {}
    for one in transitions:
        known = newest.get(one.job)
        if known is None or known.rank < one.rank:
            newest[one.job] = one
    return [newest[job] for job in sorted(newest)]


def _attempts(transitions: Iterable[Transition]) -> list[Transition]:
    """One transition for each attempt: what is known of it together. Those in the backlog are of no attempt."""
    known: dict[tuple[str, int, int], Transition] = {}
    for one in transitions:
        if not one.worker or one.step in (Step.FILED, Step.DROPPED):
            continue
        key = (one.job, one.epoch, one.attempt)
        before = known.get(key)
        if before is None or before.step < one.step:
            known[key] = replace(
                one,
                admitted_ms=one.admitted_ms or (before.admitted_ms if before else 0),
                started_ms=one.started_ms or (before.started_ms if before else 0),
            )
    return [known[key] for key in sorted(known)]


def apply(connection: Connection, transitions: Sequence[Transition]) -> list[Applied]:
    """Write transitions into `jobs` and `attempts`; one that is older than its row, or after its end, has no effect."""
    if not transitions:
        return []
    newest, attempts = _newest(transitions), _attempts(transitions)
    over = (Step.ENDED, Step.BACK)
    rows = connection.execute(
        _APPLY,
        {
            "job": [t.job for t in newest],
            "epoch": [t.epoch for t in newest],
            "attempt": [t.attempt for t in newest],
            "state": [t.state for t in newest],
            "step": [t.step for t in newest],
            "worker": [t.worker for t in newest],
            "incarnation": [t.incarnation for t in newest],
            "admitted": [t.admitted_ms for t in newest],
            "started": [t.started_ms for t in newest],
            "at": [t.at_ms for t in newest],
            "losses": [t.losses for t in newest],
            "error": [storable(t.error, ERROR_LENGTH) for t in newest],
            "a_job": [t.job for t in attempts],
            "a_epoch": [t.epoch for t in attempts],
            "a_attempt": [t.attempt for t in attempts],
            "a_worker": [t.worker for t in attempts],
            "a_incarnation": [t.incarnation for t in attempts],
            "a_admitted": [t.admitted_ms for t in attempts],
            "a_started": [t.started_ms for t in attempts],
            "a_ended": [t.at_ms if t.step in over else 0 for t in attempts],
            "a_outcome": [t.outcome if t.step in over else "" for t in attempts],
            "a_error": [storable(t.error, ERROR_LENGTH) for t in attempts],
        },
    ).all()
    return [Applied(row[0], row[1], row[1] == State.SCHEDULED and bool(row[2])) for row in rows]


_CLOSE: Final = text("""
UPDATE attempts SET ended_at = to_timestamp(:now / 1000.0), outcome = coalesce(outcome, 'taken_back'),
  error = coalesce(error, 'its end was lost with the ledger')
WHERE job_id = :job AND ended_at IS NULL AND (epoch, attempt) < (:epoch, :attempt)
""")


def close_attempts(connection: Connection, job: str, epoch: int, attempt: int, now_ms: int) -> None:
    """End the attempts of a job before a token that are open: newer ones were made, and what ended them was lost."""
    connection.execute(_CLOSE, {"job": job, "epoch": epoch, "attempt": attempt, "now": now_ms})


_DROP: Final = text(f"""
UPDATE jobs SET state = :state, step = {Step.DROPPED.value}, finished_at = now(), error = coalesce(:error, error)
WHERE id = :id AND state IN ('accepted', 'scheduled') RETURNING id
""")


def end_unfiled(connection: Connection, job: str, state: State, error: str | None = None) -> bool:
    """End a job that is not in the ledger: `cancelled` or `expired`. False where it is (or has ended)."""
    return connection.execute(_DROP, {"id": job, "state": state.value, "error": error}).first() is not None


@dataclass(frozen=True, slots=True)
class Identity:
    """What tells one publish under an id from another."""

    seq: int
    state: str
    attempt: int
    retries: int
    nesting: int


def identity_of(connection: Connection, job: str) -> Identity | None:
    """The identity of a row, None where there is no such job."""
    row = connection.execute(
        text("SELECT seq, state, attempt, retries, nesting FROM jobs WHERE id = :id"), {"id": job}
    ).one_or_none()
    return Identity(*row) if row is not None else None
