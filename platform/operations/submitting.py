"""Submissions by the name of a task, for programs that do not import it.

A submission has no row in the audit: its job is a durable row already, and the sender in its message says who. A row of
the audit for each would double what a busy client writes, and drive the actions on workers and jobs out of sight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from kombu.utils.uuid import uuid
from sqlalchemy import text

from celery_capacity.routing.database.audit import Actor
from celery_capacity.routing.database.postgres_errors import translated
from celery_capacity.routing.errors import InvalidRequest, PlatformError
from celery_capacity.routing.model.identifiers import check_job_id
from celery_capacity.routing.model.message import SENDER

if TYPE_CHECKING:
    from celery import Celery

    from celery_capacity.workers.process.stores import Stores


@dataclass(frozen=True, slots=True)
class Submission:
    """A job to be submitted. `id`: the id that the job is to have, by which a repeated submission is known."""

    task: str
    args: Sequence[Any]
    kwargs: dict[str, Any]
    id: str | None
    options: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Submitted:
    """Result of a submission. `new`: False where the job existed before. `refused`: why there is no job."""

    id: str
    new: bool = False
    refused: PlatformError | None = None

    def to_json(self) -> dict[str, Any]:
        return {"id": self.id, "new": self.new, "refused": self.refused and self.refused.to_problem()}


def sent_by(actor: Actor) -> dict[str, str]:
    """Return the header of a message that names the operator as its sender."""
    return {SENDER: actor.name}


_EXISTING: Final = text("""
SELECT id, name FROM jobs WHERE id = ANY(CAST(:ids AS text[]))
UNION ALL SELECT id, name FROM jobs_archive WHERE id = ANY(CAST(:ids AS text[]))
""")


def submit_all(app: Celery, stores: Stores, actor: Actor, submissions: Sequence[Submission]) -> list[Submitted]:
    """Submit jobs one by one, and return what became of each. A refusal of one does not keep the others from it.

    The actor is the sender of each job.
    """
    ids = [submission.id or uuid() for submission in submissions]
    with translated("no job was submitted: "), stores.engine.connect() as connection:
        valid = [job for job in ids if _is_valid(job)]
        tasks: dict[str, str] = {row.id: row.name for row in connection.execute(_EXISTING, {"ids": valid})}
    results: list[Submitted] = []
    for job, submission in zip(ids, submissions, strict=True):
        result = _submit(app, actor, job, submission, tasks.get(job))
        if result.refused is None and result.id == job:
            tasks.setdefault(job, submission.task)
        results.append(result)
    stores.sending.flush()
    return results


def _is_valid(job: str) -> bool:
    try:
        return bool(check_job_id(job))
    except InvalidRequest:
        return False


def _submit(app: Celery, actor: Actor, job: str, submission: Submission, existing: str | None) -> Submitted:
    """Submit one job. `existing`: the task of the job that has its id already."""
    if existing is not None:
        if existing == submission.task:
            return Submitted(job)
        advice = "Choose another id, or leave it out."
        return Submitted(
            job, refused=InvalidRequest(f"job {job} exists, and its task is {existing}", value=job, advice=advice)
        )
    options = {"task_id": job, "headers": sent_by(actor), **submission.options}
    try:
        sent = app.send_task(submission.task, submission.args, submission.kwargs, **options)
    except PlatformError as error:
        return Submitted(job, refused=error)
    return Submitted(str(sent.id), new=str(sent.id) == job)
