"""Constraints of a job beside its time and a worker: the success of other jobs, and the rate of its task.

A constrained job is `scheduled` without a time (`due_at` is null), so no store starts it. It holds nothing and is in no
ledger. Its row says how many jobs it waits for (`needs`) and if a rate holds it (`rated`). The insert writes both
(`routing.insert.single`). Once the last constraint is met the job gets its time, and comes in like every due job.

How an end reaches the jobs that wait for it, and what a crash leaves::

    the transaction of the end    a trigger notes the final state in `dependencies`, for every writer
    a crash here                  the duty finds the note within its interval
    `open_needs`                  deletes the notes and subtracts them from the waiting rows, in one transaction: a
                                  second caller finds nothing. A job that can never start is cancelled, which is an
                                  end in turn
    a crash here                  a job that got its time is due, and the duty brings it in

Rates are token buckets in Postgres (`open_rate`, see migration 0004), by its clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from sqlalchemy import Connection, Engine, TextClause, text
from sqlalchemy.exc import OperationalError

from celery_capacity.routing.database.postgres_errors import is_locked
from celery_capacity.routing.insert.single import MAX_LET_GO, OPEN_RATE
from celery_capacity.routing.model.job import Rate
from celery_capacity.routing.model.outbox import UNTOLD
from celery_capacity.routing.model.states import State, Step

#: Jobs whose constraints are lifted in one transaction.
CHUNK: Final = 500
#: Unique keys looked at in one pass of the duty.
KEYS: Final = 2000


@dataclass(slots=True)
class Opened:
    """Jobs whose constraints were decided. `due`: they may start now. `scheduled`: their time has not come.

    `cancelled`: they can never start, since a job that they needed did not succeed.
    """

    due: list[str] = field(default_factory=list)
    scheduled: list[str] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)


_RIPE: Final = text("""
SELECT DISTINCT job FROM dependencies WHERE ended_as IS NOT NULL AND job <> ALL(CAST(:without AS text[]))
ORDER BY job LIMIT :most
""")
_LOCK: Final = "SELECT id FROM jobs WHERE id = ANY(CAST(:ids AS text[])) ORDER BY id FOR NO KEY UPDATE"
_LOCKING: Final = (text(_LOCK), text(f"{_LOCK} SKIP LOCKED"))
_GONE: Final = text("""
SELECT w.id FROM unnest(CAST(:ids AS text[])) AS w (id) WHERE NOT EXISTS (SELECT 1 FROM jobs WHERE jobs.id = w.id)
""")
# A statement of its own: it sees the writes of transactions whose locks the statement before waited for.
_OPEN: Final = text(f"""
WITH told AS (
  DELETE FROM dependencies WHERE job = ANY(CAST(:ids AS text[])) AND ended_as IS NOT NULL
  RETURNING job_seq, job, needs, ended_as
), sums AS (
  SELECT job_seq, job, count(*) AS met,
    min('job ' || needs || ', which it needs, ' || CASE ended_as WHEN 'unknown' THEN 'is unknown'
      ELSE 'ended as ' || ended_as END) FILTER (WHERE ended_as <> '{State.SUCCEEDED.value}') AS broken
  FROM told GROUP BY job_seq, job
)
UPDATE jobs SET
  needs = CASE WHEN broken IS NULL THEN jobs.needs - met ELSE jobs.needs END,
  state = CASE WHEN broken IS NULL THEN jobs.state ELSE '{State.CANCELLED.value}' END,
  step = CASE WHEN broken IS NULL THEN jobs.step ELSE {Step.DROPPED.value} END,
  finished_at = CASE WHEN broken IS NOT NULL THEN clock_timestamp() END,
  error = coalesce(broken, jobs.error),
  outbox = CASE WHEN broken IS NOT NULL THEN '{UNTOLD}' END,
  due_at = CASE WHEN broken IS NULL AND jobs.needs = met AND NOT jobs.rated AND jobs.key_limits IS NULL
    THEN coalesce(jobs.not_before, clock_timestamp()) END
FROM sums
WHERE jobs.id = sums.job AND jobs.seq = sums.job_seq AND jobs.state = '{State.SCHEDULED.value}' AND jobs.due_at IS NULL
RETURNING jobs.id, jobs.state, jobs.due_at <= clock_timestamp()
""")


def open_needs(engine: Engine) -> Opened:
    """Lift the constraints of all jobs that waited for jobs that have ended, or cancel those that can never start.

    Jobs that waited for a job cancelled here are included. Several callers may do it at once. A job whose row somebody
    keeps locked is left for later.
    """
    opened = Opened()
    for lock in _LOCKING:
        try:
            _open_all(engine.execution_options(isolation_level="READ COMMITTED"), lock, opened)
            break
        except OperationalError as error:
            if not is_locked(error) or lock is _LOCKING[-1]:
                raise
    return opened


def _open_all(transactions: Engine, lock: TextClause, opened: Opened) -> None:
    left: list[str] = []
    while True:
        with transactions.begin() as connection:
            ripe = list(connection.execute(_RIPE, {"most": CHUNK, "without": left}).scalars())
            if not ripe:
                return
            ids = list(connection.execute(lock, {"ids": ripe}).scalars())
            ids += connection.execute(_GONE, {"ids": [job for job in ripe if job not in ids]}).scalars()
            left += set(ripe).difference(ids)
            for job, state, due in connection.execute(_OPEN, {"ids": ids}):
                if state == State.CANCELLED:
                    opened.cancelled.append(job)
                elif due is not None:
                    (opened.due if due else opened.scheduled).append(job)


_NEEDS: Final = text("SELECT needs FROM dependencies WHERE job_seq = :seq ORDER BY needs LIMIT :most")


def needs_of(connection: Connection, seq: int, most: int) -> list[str]:
    """Return at most `most` ids of jobs for which a job waits. `seq`: the order of submission of the waiting job."""
    return list(connection.execute(_NEEDS, {"seq": seq, "most": most}).scalars())


# -- rates

_HELD: Final = text("""
SELECT name FROM rates WHERE EXISTS (SELECT 1 FROM jobs WHERE jobs.name = rates.name
  AND rated AND state = 'scheduled' AND due_at IS NULL AND needs = 0 AND key_limits IS NULL) ORDER BY name
""")


def let_go(connection: Connection, burst: float) -> int:
    """Give their time to as many jobs of each task as its rate allows now; return how many.

    `burst`: seconds of a rate for which unused starts are saved up.
    """
    went = 0
    for name in connection.execute(_HELD).scalars().all():
        values = {"name": name, "rate": None, "said": None, "burst": burst, "most": MAX_LET_GO}
        went += len(connection.execute(OPEN_RATE, values).all())
    return went


@dataclass(frozen=True, slots=True)
class KnownRate:
    """A rate in the database. `by_control`: set at run time."""

    rate: Rate
    by_control: bool


_RATES: Final = text("SELECT name, rate, said, by_control FROM rates")
_SET_RATE: Final = text("""
INSERT INTO rates (name, rate, said, by_control) VALUES (:name, :rate, :said, :by_control)
ON CONFLICT (name) DO UPDATE SET rate = excluded.rate, said = excluded.said, by_control = excluded.by_control,
  tokens = least(rates.tokens, 1), counted_at = clock_timestamp()
WHERE (excluded.by_control OR NOT rates.by_control) AND (rates.said, rates.by_control)
  IS DISTINCT FROM (excluded.said, excluded.by_control)
""")


def known_rates(connection: Connection) -> dict[str, KnownRate]:
    """Return the rates of all tasks that have, or had, a rate, by task name."""
    return {row[0]: KnownRate(Rate(row[1], row[2]), row[3]) for row in connection.execute(_RATES)}


def set_rate(connection: Connection, name: str, rate: Rate, by_control: bool) -> None:
    """Store the rate of a task. `by_control`: it is set at run time.

    A rate set at run time wins over a rate that the task declares.
    """
    values: dict[str, Any] = {"name": name, "rate": rate.per_second, "said": rate.said, "by_control": by_control}
    connection.execute(_SET_RATE, values)


_LIFT: Final = text("""
UPDATE rates SET rate = 0, said = '0' WHERE name = ANY(CAST(:names AS text[])) AND NOT by_control AND rate > 0
""")


def lift_rates(connection: Connection, names: Sequence[str]) -> None:
    """Store that these tasks declare no rate, or none any more. A rate set at run time stays."""
    connection.execute(_LIFT, {"names": list(names)})


# -- unique keys

# A key that was claimed just now is left alone: its job may not be visible to this statement yet.
_FORGET: Final = text("""
DELETE FROM unique_keys WHERE key IN (
  SELECT k.key FROM (SELECT * FROM unique_keys WHERE key >= :start ORDER BY key LIMIT :most) AS k
  WHERE k.claimed_at <= now() - make_interval(secs => :age) AND (k.until IS NULL OR k.until <= now())
    AND NOT EXISTS (SELECT 1 FROM jobs WHERE jobs.id = k.job AND jobs.finished_at IS NULL)
) AND claimed_at <= now() - make_interval(secs => :age)
""")


def forget_keys(connection: Connection, start: str, age: float) -> int:
    """Delete keys from `start` on that block no job any more and are at least `age` seconds old; return how many."""
    return connection.execute(_FORGET, {"start": start, "age": age, "most": KEYS}).rowcount
