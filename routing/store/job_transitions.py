"""Writes of job transitions to Postgres: each function is one guarded statement on the caller's connection.

State and token stand in the WHERE of every write: `(epoch, attempt, step)` only grows, and a final state has no exit.
Statements are autocommitted one by one unless the caller opened a transaction.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import OperationalError

from celery_capacity.routing.database.postgres_errors import is_locked
from celery_capacity.routing.database.prepared_statement import Prepared
from celery_capacity.routing.errors import storable
from celery_capacity.routing.insert import columns, replacements, successors
from celery_capacity.routing.model import outbox
from celery_capacity.routing.model.amounts import DEFAULT_QUEUE, LABEL
from celery_capacity.routing.model.states import FINAL, Outcome, Rank, State, Step
from celery_capacity.routing.model.token import Token

#: Characters of an error that a row keeps.
ERROR_LENGTH: Final = 8000
#: Most jobs, and most attempts, for which the statement keeps its prepared plan.
FEW: Final = 100
_FINAL: Final = ", ".join(f"'{state.value}'" for state in sorted(FINAL))


@dataclass(frozen=True, slots=True)
class Transition:
    """A step of a job, as an entry of the stream has it. Times in milliseconds; '' and 0 mean none."""

    job: str
    token: Token
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
    #: Results and publishes that are left to be delivered, see `routing.model.outbox`.
    outbox: str = ""
    #: True: the worker itself sends the result, events and signals.
    told: bool = False
    #: Shape of an attempt that holds one of several alternatives, as `holding` makes it; "" for all others.
    shape: str = ""

    @property
    def rank(self) -> Rank:
        return self.token, self.step


#: The error of a job that was revoked, and the text of the exception that its result carries, as Celery has it.
REVOKED: Final = "revoked"
#: The queue of a successor, of its shape (`Request.queue`).
_QUEUE_OF: Final = f"coalesce(substring(jobs.successor_shape from '{LABEL}([^=,]+)=1'), '{DEFAULT_QUEUE}')"
#: Error of an attempt whose end was lost: only a later attempt or end shows that it is over.
END_LOST: Final = "its end was lost with the ledger"

# A row has the state of its newest transition, so the order and the batches of transitions make no difference; earlier
# attempts are in `attempts`. An attempt that ends while its row holds a successor does not end the job: the successor
# runs. An attempt that ended its job itself (`routing.store.fencing`) has stored how: its worker's report adds only the
# outbox. A revoked job that would go on (`routing.recovery.revocation`) stops there. A job that starts by a rate goes
# on under that rate again, and one with limits by key under these. A replacement brings limits of its own. A job that
# waits again after an attempt of at least PLATFORM_AGEING ages from then: it missed steps (`routing.database.ageing`).
# The statement runs some 50 times a second, so each table is joined once, by its key, and the rows come as two texts:
# Postgres parses, plans and evaluates each parameter of a prepared statement for itself; 23 arrays were a sixth of the
# cost. Postgres expects 100 rows of such a text. LIMIT tells it the number, or makes it expect 10 in a generic plan.
_APPLY: Final = Prepared.of(
    "celery_capacity_apply",
    f"""
WITH e AS (
  SELECT * FROM json_to_recordset(CAST(:newest AS json)) AS e (job text, epoch bigint, attempt int, state text,
    step smallint, worker text, incarnation text, admitted bigint, started bigint, at bigint, losses smallint,
    error text, outbox text, shape text, request text) LIMIT CAST(:jobs AS int)
), x AS (
  SELECT * FROM json_to_recordset(CAST(:attempts AS json)) AS x (job text, epoch bigint, attempt int, worker text,
    incarnation text, admitted bigint, started bigint, ended bigint, outcome text, error text)
  LIMIT CAST(:noted AS int)
), j AS (
  SELECT e.*, jobs.state IN ({_FINAL}) AS committed,
    jobs.state NOT IN ({_FINAL}) AND jobs.successor IS NOT NULL AND e.step IN ({Step.ENDED.value}, {Step.BACK.value})
      AND e.state <> '{State.CANCELLED.value}' AND jobs.revoked_at IS NULL AS goes_on,
    jobs.state NOT IN ({_FINAL}) AND jobs.revoked_at IS NOT NULL AND (e.step = {Step.BACK.value} OR
      (jobs.successor IS NOT NULL AND e.step = {Step.ENDED.value} AND e.state <> '{State.CANCELLED.value}')) AS stopped,
    CASE WHEN jobs.successor IS NOT NULL AND jobs.successor_nesting > jobs.nesting THEN jobs.successor_key_limits
      ELSE jobs.key_limits END AS next_limits
  FROM jobs JOIN e ON jobs.id = e.job
  WHERE (jobs.epoch, jobs.attempt, jobs.step) < (e.epoch, e.attempt, e.step) AND (jobs.state NOT IN ({_FINAL})
    OR (jobs.step = {Step.COMMITTED.value} AND (jobs.epoch, jobs.attempt) = (e.epoch, e.attempt)))
  ORDER BY jobs.id FOR NO KEY UPDATE OF jobs
), k AS (
  -- Rows that stay as they are. Locked, so that none goes into the archive while an attempt of it is written here.
  SELECT id, state, epoch, attempt FROM jobs
  WHERE id = ANY(ARRAY(SELECT job FROM x)) AND id NOT IN (SELECT job FROM j)
  ORDER BY id FOR KEY SHARE
), a AS (
  INSERT INTO attempts (job_id, epoch, attempt, worker, incarnation, admitted_at, started_at, ended_at, outcome, error)
  SELECT x.job, x.epoch, x.attempt, x.worker, x.incarnation, to_timestamp(nullif(x.admitted, 0) / 1000.0),
    to_timestamp(nullif(x.started, 0) / 1000.0), to_timestamp(nullif(x.ended, 0) / 1000.0),
    -- (It was told that a newer one had ended the job, so it has ended nothing.)
    CASE WHEN x.outcome = '{State.CANCELLED.value}' AND x.job IN (SELECT id FROM k WHERE k.state IN ({_FINAL})
      AND (k.epoch, k.attempt) > (x.epoch, x.attempt)) THEN 'taken_back' ELSE nullif(x.outcome, '') END,
    nullif(x.error, '')
  FROM x
  -- (An attempt that was made after the job had ended itself came too late, and leaves no trace; nor does one of a job
  -- that is in the archive by now.)
  WHERE (x.job IN (SELECT job FROM j) OR EXISTS (SELECT 1 FROM k WHERE k.id = x.job
    AND NOT (k.state IN ({_FINAL}) AND (k.epoch, k.attempt) < (x.epoch, x.attempt))))
  -- (Nor does one of old books that Postgres, which decided meanwhile, has overtaken.)
  AND NOT EXISTS (SELECT 1 FROM attempts n WHERE n.job_id = x.job AND n.epoch > x.epoch AND n.attempt <= x.attempt)
  ON CONFLICT (job_id, epoch, attempt) DO UPDATE SET
    admitted_at = coalesce(attempts.admitted_at, excluded.admitted_at),
    started_at = coalesce(attempts.started_at, excluded.started_at),
    ended_at = CASE WHEN attempts.error = '{END_LOST}' THEN coalesce(excluded.ended_at, attempts.ended_at)
                    ELSE coalesce(attempts.ended_at, excluded.ended_at) END,
    outcome = CASE WHEN attempts.error = '{END_LOST}' THEN coalesce(excluded.outcome, attempts.outcome)
                   ELSE coalesce(attempts.outcome, excluded.outcome) END,
    error = CASE WHEN attempts.error = '{END_LOST}' AND excluded.outcome IS NOT NULL THEN excluded.error
                 ELSE coalesce(attempts.error, excluded.error) END
)
UPDATE jobs SET
  state = CASE WHEN committed THEN jobs.state WHEN stopped THEN '{State.CANCELLED.value}'
               WHEN goes_on THEN '{State.SCHEDULED.value}' ELSE e.state END,
  epoch = e.epoch, attempt = e.attempt, behind = NULL,
  step = CASE WHEN committed THEN {Step.ENDED.value} WHEN stopped THEN {Step.DROPPED.value}
              WHEN goes_on THEN {Step.BACK.value} ELSE e.step END,
  losses = CASE WHEN committed THEN jobs.losses ELSE greatest(jobs.losses, e.losses) END,
  worker = nullif(e.worker, ''), incarnation = nullif(e.incarnation, ''),
  admitted_at = to_timestamp(nullif(e.admitted, 0) / 1000.0), started_at = to_timestamp(nullif(e.started, 0) / 1000.0),
  finished_at = CASE WHEN committed THEN jobs.finished_at
                     WHEN stopped OR (NOT goes_on AND e.state IN ({_FINAL})) THEN to_timestamp(e.at / 1000.0) END,
  error = CASE WHEN stopped THEN '{REVOKED}' WHEN NOT committed THEN nullif(e.error, '') END,
  outbox = CASE WHEN stopped THEN '{outbox.UNTOLD}'
                 WHEN committed AND e.state NOT IN ({_FINAL}) THEN '{outbox.UNTOLD}'
                WHEN NOT goes_on AND e.state IN ({_FINAL}) THEN nullif(e.outbox, '') END,
  due_at = CASE WHEN NOT goes_on AND jobs.step < {Step.BACK.value} AND e.step IN ({Step.BACK.value}, {Step.FILED.value})
                  AND e.state IN ('{State.ACCEPTED.value}', '{State.WAITING.value}')
                  AND jobs.admitted_at <= to_timestamp(e.at / 1000.0)
                    - (SELECT seconds FROM ageing WHERE step = 1) * interval '1 second' THEN to_timestamp(e.at / 1000.0)
                WHEN NOT goes_on AND e.state <> '{State.SCHEDULED.value}' THEN jobs.due_at
                WHEN NOT jobs.rated AND next_limits IS NULL
                THEN coalesce(CASE WHEN goes_on THEN jobs.successor_due_at ELSE jobs.due_at END, now()) END,
  not_before = CASE WHEN goes_on AND (jobs.rated OR next_limits IS NOT NULL) THEN jobs.successor_due_at
                    ELSE jobs.not_before END,
  key_limits = CASE WHEN goes_on THEN next_limits ELSE jobs.key_limits END,
  message = CASE WHEN goes_on THEN jobs.successor ELSE jobs.message END,
  shape = CASE WHEN goes_on THEN jobs.successor_shape
               WHEN e.step <= {Step.ENDED.value} THEN coalesce(e.shape, jobs.shape)
               WHEN {columns.HAS_ALTERNATIVES} THEN {columns.WAITING_SHAPE} ELSE jobs.shape END,
  queue = CASE WHEN goes_on THEN {_QUEUE_OF} ELSE jobs.queue END,
  request = CASE WHEN goes_on THEN jobs.successor_request WHEN e.step <= {Step.ENDED.value}
                 THEN coalesce(e.request::jsonb, jobs.request)
                 WHEN {columns.HAS_ALTERNATIVES} THEN {columns.WAITING_REQUEST} ELSE jobs.request END,
  expected_ms = CASE WHEN goes_on THEN coalesce(jobs.successor_expected_ms, 0) ELSE jobs.expected_ms END,
  name = CASE WHEN goes_on THEN coalesce(jobs.successor_name, jobs.name) ELSE jobs.name END,
  rerun = CASE WHEN goes_on THEN coalesce(jobs.successor_rerun, jobs.rerun) ELSE jobs.rerun END,
  retries = CASE WHEN goes_on THEN jobs.successor_retries ELSE jobs.retries END,
  nesting = CASE WHEN goes_on THEN jobs.successor_nesting ELSE jobs.nesting END,
  priority = CASE WHEN goes_on AND NOT jobs.reprioritized THEN jobs.successor_priority ELSE jobs.priority END,
  expires_at = CASE WHEN goes_on THEN jobs.successor_expires_at ELSE jobs.expires_at END,
  successor = CASE WHEN goes_on THEN NULL ELSE jobs.successor END,
  successor_retries = CASE WHEN goes_on THEN NULL ELSE jobs.successor_retries END,
  successor_nesting = CASE WHEN goes_on THEN NULL ELSE jobs.successor_nesting END
FROM j AS e WHERE jobs.id = e.job
RETURNING jobs.id, jobs.state, coalesce(jobs.due_at <= now(), false), jobs.replaces,
  jobs.awaited AND jobs.finished_at IS NOT NULL, jobs.key_limits IS NOT NULL
""",
)


@dataclass(frozen=True, slots=True)
class Applied:
    """A row that a transition changed, or that an attempt had left to be inserted.

    `due`: submit it now. `awaited`: it has ended, and other jobs wait for that (`routing.store.dependencies`).
    `limited`: it has limits by key, and others may start in its place (`routing.insert.key_limits`).
    """

    job: str
    state: str
    due: bool
    awaited: bool = False
    limited: bool = False


def _newest(transitions: Iterable[Transition]) -> list[Transition]:
    """Return the newest transition of each job, in the order of ids, so that all writers lock in one order."""
    newest: dict[str, Transition] = {}
    for transition in transitions:
        if transition.job not in newest or newest[transition.job].rank < transition.rank:
            newest[transition.job] = transition
    return [newest[job] for job in sorted(newest)]


def _attempts(transitions: Iterable[Transition]) -> list[Transition]:
    """Merge the transitions of each attempt into one. Transitions in the backlog belong to no attempt."""
    merged: dict[tuple[str, Token], Transition] = {}
    for transition in transitions:
        if not transition.worker or transition.step in (Step.FILED, Step.DROPPED):
            continue
        key = (transition.job, transition.token)
        before = merged.get(key)
        if before is None or before.step < transition.step:
            merged[key] = replace(
                transition,
                admitted_ms=transition.admitted_ms or (before.admitted_ms if before else 0),
                started_ms=transition.started_ms or (before.started_ms if before else 0),
            )
    return [merged[key] for key in sorted(merged)]


def _job_columns(transition: Transition) -> dict[str, str | int]:
    """Return the columns of a transition for its job, for `_APPLY`."""
    return {
        "job": transition.job,
        **transition.token.columns(),
        "state": transition.state,
        "step": transition.step,
        "worker": transition.worker,
        "incarnation": transition.incarnation,
        "admitted": transition.admitted_ms,
        "started": transition.started_ms,
        "at": transition.at_ms,
        "losses": transition.losses,
        "error": storable(transition.error, ERROR_LENGTH),
        "outbox": _outbox(transition),
        **columns.held_columns(transition.shape),
    }


def _is_over(transition: Transition) -> bool:
    return transition.step in (Step.ENDED, Step.BACK)


def _attempt_columns(transition: Transition) -> dict[str, str | int]:
    """Return the columns of a transition for its attempt, for `_APPLY`."""
    over = _is_over(transition)
    return {
        "job": transition.job,
        **transition.token.columns(),
        "worker": transition.worker,
        "incarnation": transition.incarnation,
        "admitted": transition.admitted_ms,
        "started": transition.started_ms,
        "ended": transition.at_ms if over else 0,
        "outcome": transition.outcome if over else "",
        "error": storable(transition.error, ERROR_LENGTH),
    }


def _rows(values: Iterable[dict[str, str | int]]) -> str:
    # Characters are sent as they are: a database's encoding may lack characters that \u1234 could name.
    return json.dumps(list(values), ensure_ascii=False)


def apply(connection: Connection, transitions: Sequence[Transition]) -> list[Applied]:
    """Write transitions into `jobs` and `attempts`; return the rows that changed.

    A transition that is older than its row, or after its end, has no effect. Publishes that the attempts left are
    inserted first: a retry must be there before its attempt ends.
    """
    if not transitions:
        return []
    published = _publish(connection, [transition for transition in transitions if outbox.publishes(transition.outbox)])
    if requeued := [(end.job, end.token) for end in transitions if end.outcome == Outcome.REQUEUED]:
        successors.put_behind(connection, requeued)
    newest, attempts = _newest(transitions), _attempts(transitions)
    values: dict[str, str | int] = {
        "newest": _rows(_job_columns(t) for t in newest),
        "jobs": len(newest),
        "attempts": _rows(_attempt_columns(t) for t in attempts),
        "noted": len(attempts),
    }
    rows = _APPLY.rows(connection, values, few=len(newest) <= FEW and len(attempts) <= FEW)
    changed = {row[0] for row in rows}
    _close_overtaken(connection, newest, changed)
    _close_late(connection, [t.job for t in attempts if t.job not in changed and not _is_over(t)])
    # A row with an outbox is looked at when that is delivered.
    replacements.end_abandoned(connection, [row[3] for row in rows if row[3] and row[1] in FINAL])
    return [
        *(Applied(row[0], row[1], row[1] == State.SCHEDULED and row[2], row[4], row[5]) for row in rows),
        *(Applied(job, State.ACCEPTED, True) for job in published),
    ]


_LOCKED: Final = text("""
WITH free AS (SELECT id FROM jobs WHERE id = ANY(CAST(:ids AS text[])) FOR NO KEY UPDATE SKIP LOCKED)
SELECT id FROM jobs WHERE id = ANY(CAST(:ids AS text[])) AND id NOT IN (SELECT id FROM free)
""")


def apply_unlocked(
    engine: Engine, transitions: Sequence[Transition], *, wait: bool = True
) -> tuple[list[Applied], list[Transition]]:
    """Write transitions as `apply` does, each statement committed by itself; return also those left for later.

    Transitions of jobs whose rows somebody keeps locked are left. Without `wait` the locked rows are looked up at once.
    Raises the error of Postgres where none can be written, as with a locked table.
    """
    try:
        if wait:
            with engine.connect() as connection:
                return apply(connection, transitions), []
    except OperationalError as error:
        if not is_locked(error):
            raise
    with engine.connect() as connection:
        locked = set(connection.execute(_LOCKED, {"ids": [transition.job for transition in transitions]}).scalars())
        applied = apply(connection, [transition for transition in transitions if transition.job not in locked])
    return applied, [transition for transition in transitions if transition.job in locked]


def free(connection: Connection, jobs: Sequence[str]) -> set[str]:
    """Lock the rows of these jobs in the caller's transaction, without those locked elsewhere; return their ids."""
    return set(jobs).difference(connection.execute(_LOCKED, {"ids": list(jobs)}).scalars())


def _close_overtaken(connection: Connection, newest: Sequence[Transition], changed: set[str]) -> None:
    """Close the open earlier attempts of jobs that have ended: none of them goes on.

    Their ends may have been lost with the ledger. An end that arrives after all replaces this one.
    """
    for transition in newest:
        dropped = transition.step == Step.DROPPED
        before = transition.token.next() if dropped else transition.token
        if transition.state in FINAL and transition.job in changed and before.attempt > 1:
            close_attempts(connection, transition.job, before, transition.at_ms)


_CLOSE_LATE: Final = text(f"""
UPDATE attempts SET ended_at = now(), outcome = coalesce(outcome, 'taken_back'),
  error = coalesce(attempts.error, '{END_LOST}')
FROM jobs WHERE jobs.id = attempts.job_id AND jobs.id = ANY(CAST(:jobs AS text[])) AND jobs.state IN ({_FINAL})
  AND attempts.ended_at IS NULL
  AND (attempts.epoch, attempts.attempt) < (jobs.epoch, jobs.attempt + (jobs.step = {Step.DROPPED.value})::int)
""")


def _close_late(connection: Connection, jobs: Sequence[str]) -> None:
    """Close attempts that Postgres learned of only now, where a newer attempt has ended the job.

    Their workers could not write for so long. The ends that they report are refused.
    """
    if jobs:
        connection.execute(_CLOSE_LATE, {"jobs": list(jobs)})


_OVERTAKEN: Final = text("""
SELECT x.number FROM unnest(CAST(:job AS text[]), CAST(:epoch AS bigint[]), CAST(:attempt AS int[]))
  WITH ORDINALITY AS x (job, epoch, attempt, number)
LEFT JOIN jobs j ON j.id = x.job WHERE j.id IS NULL OR (j.epoch, j.attempt) > (x.epoch, x.attempt)
""")


def _publish(connection: Connection, transitions: Sequence[Transition]) -> list[str]:
    """Insert the publishes that attempts left; return the ids of the jobs that may start.

    A publish is skipped where a newer attempt has the job, or the job is in the archive.
    """
    if not transitions:
        return []
    values = {
        "job": [t.job for t in transitions],
        "epoch": [t.token.epoch for t in transitions],
        "attempt": [t.token.attempt for t in transitions],
    }
    overtaken = set(connection.execute(_OVERTAKEN, values).scalars())
    current = [transition for number, transition in enumerate(transitions, 1) if number not in overtaken]
    return [job for transition in current for job in successors.publish_left(connection, transition.outbox)]


#: Ends that no worker reports to clients, unless `told`. Nor does one report the end of a job in the backlog.
_SILENT: Final = (State.CANCELLED, State.EXPIRED, State.LOST)


def _outbox(transition: Transition) -> str:
    untold = (transition.state in _SILENT or transition.step == Step.DROPPED) and not transition.told
    return transition.outbox or (outbox.UNTOLD if untold else "")


_CLOSE: Final = text(f"""
UPDATE attempts SET ended_at = to_timestamp(:now / 1000.0), outcome = coalesce(outcome, 'taken_back'),
  error = coalesce(error, '{END_LOST}')
WHERE job_id = :job AND ended_at IS NULL AND (epoch, attempt) < (:epoch, :attempt)
""")


def close_attempts(connection: Connection, job: str, before: Token, now_ms: int) -> None:
    """End the open attempts of a job before a token: newer ones were made, and the ends of these were lost."""
    connection.execute(_CLOSE, {"job": job, **before.columns(), "now": now_ms})
