"""Ageing: a waiting job gains a step of priority in each PLATFORM_AGEING seconds, and no stream of others starves it.

The age is one factor of priority, as in Slurm's multifactor plugin (PriorityWeightAge). Here it has the unit of
priority: after n times the setting, a job of priority p stands among those of p + n, in the order of submission.

A job waits from its submission, or from the time at which it was due: after an eta, or the pause before a retry. A
pass raises the jobs that have come to their next step since the pass before, and reads no others:

- Numbers of submission rise with time. `ageing_marks` notes the highest number now and then, so the jobs that were
  submitted before a moment are those up to a number. `ageing` has, for each step, the number up to which jobs have it.
- Jobs that were due at a time are found by it, in an index of their own. While Postgres decides they are `scheduled`
  until they start.

So an insert costs nothing more, and a pass costs what it raises, however many jobs wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from sqlalchemy import Connection, text

from celery_capacity.routing.policy.placement import TOP_PRIORITY

#: Jobs that one statement raises.
CHUNK: Final = 500
#: Marks in the time of a step: a job gains a step late by at most this part of the setting.
MARKS: Final = 10

_WAITS: Final = "state IN ('accepted', 'waiting')"

_DROP_OTHERS: Final = text("DELETE FROM ageing WHERE seconds <> :seconds")
_BEGIN: Final = text("""
INSERT INTO ageing (step, seconds, since)
SELECT step, :seconds, clock_timestamp() FROM generate_series(1, :steps) AS s (step) ON CONFLICT (step) DO NOTHING
""")
_MARK: Final = text(f"""
INSERT INTO ageing_marks (at, seq)
SELECT clock_timestamp(), coalesce(max(seq), 0) FROM (
  (SELECT seq FROM jobs WHERE state = 'accepted' ORDER BY seq DESC LIMIT 1)
  UNION ALL (SELECT seq FROM jobs WHERE state = 'waiting' ORDER BY seq DESC LIMIT 1)
  UNION ALL (SELECT seq FROM ageing_marks ORDER BY at DESC LIMIT 1)
) AS x
WHERE NOT EXISTS (
  SELECT FROM ageing_marks WHERE at > clock_timestamp() - make_interval(secs => CAST(:seconds AS float) / {MARKS})
)
""")
_FORGET: Final = text("""
DELETE FROM ageing_marks WHERE at < (
  SELECT max(at) FROM ageing_marks
  WHERE at <= clock_timestamp() - make_interval(secs => CAST(:seconds AS float) * :steps)
)
""")
_STEPS: Final = text("""
SELECT step, ageing.seq, due_at, marks.seq, x.at FROM ageing
CROSS JOIN LATERAL (SELECT clock_timestamp() - make_interval(secs => seconds * step) AS at) AS x
LEFT JOIN LATERAL (
  SELECT seq FROM ageing_marks WHERE ageing_marks.at <= x.at ORDER BY ageing_marks.at DESC LIMIT 1
) AS marks ON true
WHERE x.at >= since ORDER BY step DESC
""")
_SUBMITTED: Final = text(f"""
SELECT x.id, x.seq FROM generate_series(0, {TOP_PRIORITY - 1}) AS p (priority) CROSS JOIN LATERAL (
  SELECT id, seq FROM jobs
  WHERE {_WAITS} AND (- jobs.priority) = - p.priority AND seq > :after AND seq <= :until AND due_at IS NULL
  ORDER BY seq LIMIT {CHUNK}
) AS x ORDER BY x.seq LIMIT {CHUNK}
""")
_WERE_DUE: Final = text(f"""
SELECT id, due_at FROM (
  SELECT id, due_at FROM jobs
  WHERE {_WAITS} AND due_at IS NOT NULL AND due_at > :after AND due_at <= :until AND priority < {TOP_PRIORITY}
  UNION ALL
  SELECT id, due_at FROM jobs
  WHERE state = 'scheduled' AND due_at > :after AND due_at <= :until AND priority < {TOP_PRIORITY}
) AS x ORDER BY due_at FETCH FIRST {CHUNK} ROWS WITH TIES
""")
#: A locked row is one that starts or ends now.
_RAISE: Final = text(f"""
WITH x AS (
  SELECT id FROM jobs WHERE id = ANY(CAST(:ids AS text[])) AND priority < {TOP_PRIORITY}
    AND ({_WAITS} OR (state = 'scheduled' AND due_at <= now()))
  ORDER BY id FOR NO KEY UPDATE SKIP LOCKED
)
UPDATE jobs SET priority = priority + 1, reprioritized = true FROM x WHERE jobs.id = x.id
RETURNING jobs.id
""")
#: Another runner that gives the same step waits here, and sees then how far it is given.
_IS_CURRENT: Final = text("""
SELECT EXISTS (SELECT FROM (
  SELECT step FROM ageing WHERE step = :step AND seq = :seq AND due_at = :due_at FOR NO KEY UPDATE
) AS x)
""")
_ADVANCE: Final = text("""
UPDATE ageing SET seq = coalesce(:seq, seq), due_at = coalesce(CAST(:due_at AS timestamptz), due_at) WHERE step = :step
""")


@dataclass(frozen=True, slots=True)
class Step:
    """A step that some jobs have come to.

    Jobs that were submitted up to number `submitted` have it, and those that were due up to `due`. By the time, it
    is now to be given up to number `until`, None for none yet, and to those that were due up to `at`.
    """

    number: int
    submitted: int
    due: datetime
    until: int | None
    at: datetime


def steps_gained(waited: float, seconds: float) -> int:
    """Return the steps of priority that a job has gained in so many seconds: one in each `seconds`, 0 for no ageing."""
    return min(TOP_PRIORITY, int(waited / seconds)) if seconds else 0


def mark(connection: Connection, seconds: float) -> None:
    """Note the newest number of submission, if the last mark is old enough. Another setting starts the ages anew."""
    values = {"seconds": seconds, "steps": TOP_PRIORITY}
    if connection.execute(_DROP_OTHERS, values).rowcount:
        connection.execute(text("DELETE FROM ageing_marks"))
    connection.execute(_BEGIN, values)
    connection.execute(_MARK, values)
    connection.execute(_FORGET, values)


def forget(connection: Connection) -> None:
    """Forget how far steps were given, where ageing was in use before. Used anew, it starts the ages anew."""
    if connection.execute(text("DELETE FROM ageing")).rowcount:
        connection.execute(text("DELETE FROM ageing_marks"))


def begun_steps(connection: Connection) -> list[Step]:
    """Return the steps for which ageing has been in use long enough, the highest first."""
    return [Step(*row) for row in connection.execute(_STEPS)]


def raise_next(connection: Connection, step: Step) -> tuple[list[str], Step | None]:
    """Give a step to the next jobs that have come to it; return those raised, and the step to go on with, if any.

    Nothing is raised where another runner has given the step further meanwhile, or with another setting.
    """
    standing = {"step": step.number, "seq": step.submitted, "due_at": step.due}
    if not connection.execute(_IS_CURRENT, standing).scalar_one():
        return [], None
    if step.until is not None and step.until > step.submitted:
        jobs = connection.execute(_SUBMITTED, {"after": step.submitted, "until": step.until}).all()
        reached = jobs[-1].seq if len(jobs) == CHUNK else step.until
        onwards = Step(step.number, reached, step.due, step.until, step.at)
    else:
        jobs = connection.execute(_WERE_DUE, {"after": step.due, "until": step.at}).all()
        onwards = Step(step.number, step.submitted, jobs[-1].due_at if len(jobs) >= CHUNK else step.at, None, step.at)
    raised = _raise(connection, [job.id for job in jobs])
    values = {"step": step.number, "seq": onwards.submitted, "due_at": onwards.due}
    connection.execute(_ADVANCE, values)
    return raised, None if onwards.until is None and len(jobs) < CHUNK else onwards


def _raise(connection: Connection, ids: Sequence[Any]) -> list[str]:
    return list(connection.execute(_RAISE, {"ids": list(ids)}).scalars()) if ids else []
