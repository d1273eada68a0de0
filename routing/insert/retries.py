"""Insert of a job that repeats an ended job, together with the link between both: one transaction.

The row of the ended job is locked meanwhile. So of two callers at once, the second finds the retry of the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from sqlalchemy import Connection, text

from celery_capacity.routing.database.job_conditions import like_pattern
from celery_capacity.routing.insert.single import insert_job
from celery_capacity.routing.model.job import Inserted, NewJob
from celery_capacity.routing.model.states import FINAL, State


@dataclass(frozen=True, slots=True)
class Original:
    """A job that is to be repeated, as its row has it. `retried_as`: its newest retry. `key_limits`: as JSON."""

    seq: int
    state: State
    replaces: str | None
    message: bytes
    retried_as: str | None
    key_limits: str | None = None


@dataclass(frozen=True, slots=True)
class Repeated:
    """The result of an insert: the new row, or None where the job has a retry already (`retried_as`) or is gone."""

    inserted: Inserted | None
    retried_as: str | None = None


# A retry that puts itself back gets a new `seq`, so the newest one is told by the time at which it was made.
_RETRIED_AS: Final = (
    "(SELECT r.job FROM retries r WHERE r.of_seq = jobs.seq ORDER BY r.made_at DESC, r.seq DESC LIMIT 1)"
)
_READ: Final = text(f"SELECT seq, state, replaces, message, {_RETRIED_AS}, key_limits::text FROM jobs WHERE id = :job")
_ARCHIVED: Final = text("SELECT EXISTS (SELECT FROM jobs_archive WHERE id = :job)")
_LOCK: Final = text("SELECT state FROM jobs WHERE id = :job AND seq = :seq FOR UPDATE")
_NEWEST: Final = text("SELECT job FROM retries WHERE of_seq = :seq ORDER BY made_at DESC, seq DESC LIMIT 1")
_LINK: Final = text("INSERT INTO retries (seq, job, of_seq, of_job) VALUES (:seq, :job, :of_seq, :of_job)")
_LAST: Final = ", ".join(f"'{state.value}'" for state in sorted({State.FAILED, State.LOST}))
_FAILED: Final = text(f"""
SELECT id FROM jobs
WHERE state IN ({_LAST}) AND (CAST(:task AS text) IS NULL OR name LIKE CAST(:task AS text) ESCAPE '\\')
  AND (CAST(:since AS float) IS NULL OR finished_at >= now() - make_interval(secs => CAST(:since AS float)))
  AND (:again OR NOT EXISTS (SELECT FROM retries r WHERE r.of_seq = jobs.seq))
ORDER BY seq
""")
_RETRIED: Final = text("""
SELECT id FROM jobs WHERE id = ANY(CAST(:jobs AS text[])) AND EXISTS (SELECT FROM retries r WHERE r.of_seq = jobs.seq)
""")


def read_original(connection: Connection, job: str) -> Original | None:
    """Return a job that is to be repeated, None where there is no row of it."""
    row = connection.execute(_READ, {"job": job}).one_or_none()
    return None if row is None else Original(row[0], State(row[1]), row[2], bytes(row[3]), row[4], row[5])


def is_archived(connection: Connection, job: str) -> bool:
    """Return True if the archive has a job with this id: without its message."""
    return bool(connection.execute(_ARCHIVED, {"job": job}).scalar_one())


def failed_jobs(connection: Connection, task: str | None, since: float | None, again: bool) -> list[str]:
    """Return the jobs that failed or were lost, oldest first.

    `task`: only jobs of such a task; `*` stands for any characters. `since`: seconds; only jobs that ended within them.
    `again`: also jobs that have a retry already.
    """
    pattern = None if task is None else like_pattern(task)
    return list(connection.execute(_FAILED, {"task": pattern, "since": since, "again": again}).scalars())


def retried(connection: Connection, jobs: Sequence[str]) -> set[str]:
    """Return those of these jobs that have a retry."""
    return set(connection.execute(_RETRIED, {"jobs": list(jobs)}).scalars())


def insert_retry(connection: Connection, job: NewJob, of_job: str, of_seq: int, again: bool) -> Repeated:
    """Insert a job that repeats another, and the link. The caller's connection is in a transaction, which it commits.

    `again`: also where the other job has a retry already.
    """
    state = connection.execute(_LOCK, {"job": of_job, "seq": of_seq}).scalar_one_or_none()
    if state is None or State(state) not in FINAL:
        return Repeated(None)
    newest = connection.execute(_NEWEST, {"seq": of_seq}).scalar_one_or_none()
    if newest is not None and not again:
        return Repeated(None, str(newest))
    inserted = insert_job(connection, job)
    if inserted.seq is not None:
        link = {"seq": inserted.seq, "job": job.id, "of_seq": of_seq, "of_job": of_job}
        connection.execute(_LINK, link)
    return Repeated(inserted)
