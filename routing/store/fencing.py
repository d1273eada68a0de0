"""Commit the end of a job in the transaction of its own effect, and fence out attempts that may not do so any more.

An attempt commits its end together with its own rows, in one statement guarded by its token: a row takes one such end,
whatever runs beside it. The row is then final and `COMMITTED`, while the ledger says running until the body has
returned; the worker's own report brings the row to `ENDED`. Before the jobs of a worker are taken back, its attempts
are given up in Postgres. From then on none of them can commit, even if the worker wakes up, and a job that had
committed does not run again. The progress that an attempt reports is fenced in the same way. Each function is one
statement on the caller's connection.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection, TextClause, text
from sqlalchemy.exc import OperationalError

from celery_capacity.routing.database.postgres_errors import is_locked
from celery_capacity.routing.model.job import Publisher
from celery_capacity.routing.model.outbox import UNTOLD
from celery_capacity.routing.model.states import FINAL, State, Step
from celery_capacity.routing.model.token import Token
from celery_capacity.routing.store.job_transitions import END_LOST

_FINAL: Final = ", ".join(f"'{state.value}'" for state in sorted(FINAL))
_HOLDING: Final = f"'{State.ADMITTED.value}', '{State.RUNNING.value}'"

_KNOWS: Final = text("SELECT to_regclass(:jobs) IS NOT NULL AND to_regclass(:workers) IS NOT NULL")
_IS_REGISTERED: Final = text("SELECT EXISTS (SELECT 1 FROM workers WHERE incarnation = :incarnation)")


def is_registered(connection: Connection, incarnation: str) -> bool:
    """Return whether this incarnation of a worker is registered in this database.

    The name or URL of a database would not tell, but an incarnation stands in no other database.
    """
    if not connection.execute(_KNOWS, {"jobs": "jobs", "workers": "workers"}).scalar_one():
        return False
    return bool(connection.execute(_IS_REGISTERED, {"incarnation": incarnation}).scalar_one())


_COMMIT: Final = text(f"""
WITH w AS (SELECT name FROM workers WHERE incarnation = :incarnation), j AS (
  UPDATE jobs SET state = '{State.SUCCEEDED.value}', epoch = :epoch, attempt = :attempt, step = {Step.COMMITTED.value},
    worker = w.name, incarnation = :incarnation, finished_at = clock_timestamp(), error = NULL
  FROM w
  WHERE jobs.id = :job AND jobs.state NOT IN ({_FINAL}) AND jobs.successor IS NULL
    AND (jobs.epoch, jobs.attempt, jobs.step) < (:epoch, :attempt, {Step.COMMITTED.value})
  RETURNING jobs.id, jobs.worker, jobs.finished_at
)
INSERT INTO attempts (job_id, epoch, attempt, worker, incarnation, ended_at, outcome)
SELECT j.id, :epoch, :attempt, j.worker, :incarnation, j.finished_at, '{State.SUCCEEDED.value}' FROM j
ON CONFLICT (job_id, epoch, attempt) DO UPDATE SET
  ended_at = coalesce(attempts.ended_at, excluded.ended_at), outcome = coalesce(attempts.outcome, excluded.outcome)
RETURNING job_id, set_config(:setting, CAST(:hangs_ms AS text), true)
""")


#: Seconds after which the worker of a silent transaction is taken for lost, where the caller does not say.
HANGS_AFTER: Final = 75.0


def commit(connection: Connection, attempt: Publisher, hangs_after: float = HANGS_AFTER) -> bool:
    """End the job as succeeded by this attempt, in the caller's transaction; return False where it may not.

    An attempt may not where it lost its lease, or the job has ended. A row that is still of an older attempt takes the
    end: Postgres may be behind.

    From here to the end of the transaction the row is locked, and a caller that gives the worker up waits for it. After
    `hangs_after` seconds of silence the server ends the transaction: the machine went away, or the worker is stopped.
    """
    values = {
        "setting": "idle_in_transaction_session_timeout",
        "hangs_ms": max(1, round(hangs_after * 1000)),
        "job": attempt.job,
        **attempt.token.columns(),
        "incarnation": attempt.incarnation,
    }
    return connection.execute(_COMMIT, values).first() is not None


_WHY: Final = text("SELECT state, epoch, attempt, step, successor IS NOT NULL FROM jobs WHERE id = :job")


def why_not(connection: Connection, attempt: Publisher) -> tuple[str, bool]:
    """Return why `commit` was refused, in words, and whether the attempt itself is the cause."""
    row = connection.execute(_WHY, {"job": attempt.job}).one_or_none()
    if row is None:
        return "the job is unknown", False
    state, epoch, number, step, succeeds = row
    mine = Token(epoch, number) == attempt.token
    if state in FINAL:
        return f"the job has ended as {state} by attempt {number}", mine and step in (Step.COMMITTED, Step.ENDED)
    if succeeds:
        return "it published its own retry or replacement, which goes on with the job", True
    return "its worker was given up" if mine else f"attempt {number} has the job", False


# The end of an earlier attempt may have been lost with the ledger. No earlier attempt goes on any more.
def _closing(which: str) -> TextClause:
    return text(f"""
WITH j AS (
  UPDATE jobs SET step = {Step.ENDED.value}, outbox = coalesce(outbox, '{UNTOLD}')
  WHERE step = {Step.COMMITTED.value} AND {which} RETURNING id, epoch, attempt
), a AS (
  UPDATE attempts SET ended_at = now(), outcome = coalesce(outcome, 'taken_back'), error = coalesce(error, '{END_LOST}')
  FROM j WHERE job_id = j.id AND ended_at IS NULL AND (attempts.epoch, attempts.attempt) < (j.epoch, j.attempt)
)
SELECT id FROM j
""")


_CLOSE: Final = _closing("id = :job AND epoch = :epoch AND attempt = :attempt")
_HELD_BY: Final = f"incarnation = :incarnation AND state IN ({_HOLDING}) AND step < {Step.GIVEN_UP.value}"
_GIVE_UP: Final = text(f"UPDATE jobs SET step = {Step.GIVEN_UP.value} WHERE {_HELD_BY}")
_GIVE_UP_FREE: Final = text(f"""
UPDATE jobs SET step = {Step.GIVEN_UP.value}
WHERE {_HELD_BY} AND id IN (SELECT id FROM jobs WHERE {_HELD_BY} FOR NO KEY UPDATE SKIP LOCKED)
""")
_NOT_GIVEN_UP: Final = text(f"SELECT id FROM jobs WHERE {_HELD_BY}")


def close(connection: Connection, job: str, token: Token) -> bool:
    """Close an attempt that died and will report nothing more; return True where it had committed the end of its job.

    That end stands, and clients that wait for the result are told of it.
    """
    values = {"job": job, **token.columns()}
    return connection.execute(_CLOSE, values).first() is not None


_CLOSE_FORMER: Final = _closing("worker = :worker AND incarnation <> :incarnation")


def close_former(connection: Connection, worker: str, incarnation: str) -> None:
    """Close all committed ends that former incarnations of a worker did not report: this one has the name now."""
    connection.execute(_CLOSE_FORMER, {"worker": worker, "incarnation": incarnation})


def give_up(connection: Connection, incarnation: str) -> set[str]:
    """Forbid each attempt of this incarnation of a worker to commit or publish; return the jobs whose rows stay locked.

    A commit on its way is waited for. The attempts of the returned jobs are not given up. The rows are up to date,
    because the caller has applied the stream.
    """
    try:
        connection.execute(_GIVE_UP, {"incarnation": incarnation})
        return set()
    except OperationalError as error:
        if not is_locked(error):
            raise
    connection.execute(_GIVE_UP_FREE, {"incarnation": incarnation})
    return set(connection.execute(_NOT_GIVEN_UP, {"incarnation": incarnation}).scalars())


_COMMITTED: Final = text(f"""
SELECT id, epoch, attempt FROM jobs
WHERE step = {Step.COMMITTED.value} AND (CAST(:incarnation AS text) IS NULL OR incarnation = :incarnation) ORDER BY id
""")


def committed(connection: Connection, incarnation: str | None = None) -> list[tuple[str, Token]]:
    """Return attempts (job, token) that ended their jobs themselves and have not reported that yet.

    `incarnation`: only those of this incarnation of a worker; None: of all workers.
    """
    rows = connection.execute(_COMMITTED, {"incarnation": incarnation})
    return [(job, Token(epoch, attempt)) for job, epoch, attempt in rows]


#: Condition that the worker of a job's attempt has ended, or has a newer incarnation.
OF_NOBODY: Final = """NOT EXISTS (
  SELECT 1 FROM workers w WHERE w.incarnation = jobs.incarnation AND w.status IN ('ready', 'draining')
    AND NOT EXISTS (SELECT 1 FROM workers n WHERE n.name = w.name AND n.started_at > w.started_at
                    AND n.status IN ('ready', 'draining')))"""
_COMMITTED_ON_NOBODY: Final = text(
    f"SELECT id, epoch, attempt FROM jobs WHERE step = {Step.COMMITTED.value} AND {OF_NOBODY} ORDER BY id"
)


def close_orphans(connection: Connection) -> int:
    """Close attempts that ended their jobs themselves and whose worker has ended; return how many.

    Nobody else will report these ends.
    """
    rows = connection.execute(_COMMITTED_ON_NOBODY).all()
    return sum(close(connection, job, Token(epoch, attempt)) for job, epoch, attempt in rows)


@dataclass(frozen=True, slots=True)
class Holder:
    """The newest attempt of a row. `final`: the job has ended."""

    token: Token
    step: int
    losses: int
    rerun: bool
    final: bool
    incarnation: str | None

    def takes(self, token: Token) -> bool:
        """Return whether the end of this attempt is still to be written.

        It is also for an attempt that ended its job itself: its end adds what the attempt left to be delivered.
        """
        mine = self.step == Step.COMMITTED and self.token == token
        return (mine or not self.final) and (self.token, self.step) < (token, Step.ENDED)

    def has(self, token: Token) -> bool:
        """Return whether the end of this attempt is written already, so that only the reply was lost."""
        return self.token == token and self.step in (Step.ENDED, Step.BACK)


_HOLDERS: Final = text("""
SELECT id, epoch, attempt, step, losses, rerun, state, incarnation FROM jobs
WHERE id = ANY(CAST(:ids AS text[])) ORDER BY id FOR NO KEY UPDATE
""")


def lock_holders(connection: Connection, jobs: Sequence[str]) -> Mapping[str, Holder]:
    """Lock the rows of these jobs until the end of the caller's transaction, and return them by id."""
    return {
        row[0]: Holder(Token(row[1], row[2]), row[3], row[4], row[5], row[6] in FINAL, row[7])
        for row in connection.execute(_HOLDERS, {"ids": list(jobs)})
    }


_RUNS: Final = text(f"""
SELECT state = '{State.RUNNING.value}' AND step = {Step.RUNNING.value} AND (epoch, attempt, incarnation) =
  (:epoch, :attempt, :incarnation) FROM jobs WHERE id = :job
""")


def runs(connection: Connection, attempt: Publisher) -> bool:
    """Return True if Postgres has the claim of this attempt, and its worker was not given up."""
    values = {
        "job": attempt.job,
        **attempt.token.columns(),
        "incarnation": attempt.incarnation,
    }
    return bool(connection.execute(_RUNS, values).scalar_one_or_none())


_ENDED_BY: Final = text(f"""
SELECT state = '{State.SUCCEEDED.value}' AND (epoch, attempt) = (:epoch, :attempt) FROM jobs WHERE id = :job
""")


def has_succeeded(connection: Connection, job: str, token: Token) -> bool:
    """Return whether the job has succeeded by this very attempt."""
    values = {"job": job, **token.columns()}
    return bool(connection.execute(_ENDED_BY, values).scalar_one_or_none())


def final_state(connection: Connection, job: str) -> str | None:
    """Return the state in which a job has ended; None where it has not ended."""
    state = connection.execute(text("SELECT state FROM jobs WHERE id = :job"), {"job": job}).scalar_one_or_none()
    return str(state) if state in FINAL else None


#: Condition on the row of a progress: no newer attempt is known, and this one was neither taken back nor given up.
_WRITE_PROGRESS: Final = text(f"""
UPDATE jobs SET progress = CAST(:progress AS jsonb)
WHERE id = :job AND finished_at IS NULL
  AND (epoch, attempt, CASE step WHEN {Step.GIVEN_UP.value} THEN {Step.BACK.value} ELSE step END)
    < (:epoch, :attempt, {Step.BACK.value})
  AND (progress IS NULL OR ((progress->>'epoch')::bigint, (progress->>'attempt')::int) <= (:epoch, :attempt))
  AND NOT EXISTS (SELECT FROM workers w WHERE w.incarnation = :incarnation AND w.status = 'lost')
""")


def write_progress(connection: Connection, by: Publisher, progress: Mapping[str, Any]) -> bool:
    """Write the progress that an attempt reports; return False where the attempt no longer holds its job."""
    token = by.token.columns()
    values = {
        **token,
        "job": by.job,
        "incarnation": by.incarnation,
        "progress": json.dumps({**token, **progress}),
    }
    return connection.execute(_WRITE_PROGRESS, values).rowcount == 1
