"""Results of what is done to jobs: submitted, waited for, cancelled, retried, moved."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, RootModel

from celery_capacity.platform.documents.parts import Amounts, Closed, JobId, JobPriority, Natural, one_of
from celery_capacity.routing.model.states import State
from celery_capacity.workers.client.cancel import Became as BecameCancelled
from celery_capacity.workers.client.priorities import Became as BecameMoved


class Cancelled(Closed):
    """Result of a cancel for one job."""

    id: JobId = Field(description="the id of the job, which is that of the Celery task")
    became: Annotated[str, one_of(BecameCancelled)] = Field(
        description="cancelled: it had not started; runs-on: a worker holds it, and no attempt follows; terminating:"
        " its process is being ended; cannot-terminate: it runs in a thread; ended-before: it had ended; marked: it"
        " ends as soon as its store answers"
    )
    state: State = Field(description="the state of a job, see states.md")
    worker: str | None = Field(description="the worker of the newest attempt")


class PrintedCancels(RootModel[list[Cancelled]]):
    """Result of a cancel for each job."""


class RefusedRetry(Closed):
    """The error for which a job was not retried."""

    reference: str = Field(description="the stable name of the error, see errors.md")
    detail: str = Field(description="what is wrong, and what to do")


class RetryResult(Closed):
    """Result of a retry for one job."""

    id: JobId = Field(description="the id of the job, which is that of the Celery task")
    retried_as: str | None = Field(description="the id of the new job; null: there is none")
    refused: RefusedRetry | None = Field(description="why it was not retried; null: it was")


class PrintedRetries(RootModel[list[RetryResult]]):
    """Result of a retry for each job."""


class Moved(Closed):
    """Result of a new priority for one job."""

    id: JobId = Field(description="the id of the job, which is that of the Celery task")
    became: Annotated[str, one_of(BecameMoved)] = Field(
        description="moved: it waits in its new place; next-attempt: it runs, and its next attempt has the priority;"
        " ended-before: it had ended"
    )
    state: State = Field(description="the state of a job, see states.md")
    priority: JobPriority | None = Field(description="its priority now, 0 to 9; null where it had ended")
    before: JobPriority | None = Field(description="its former priority; null where it had ended")


class PrintedPriorities(RootModel[list[Moved]]):
    """Result of a new priority for each job."""


class SubmittedJob(Closed):
    """The job that was submitted."""

    id: JobId = Field(description="the id of the job, which is that of the Celery task")
    name: str = Field(description="the name of the task")
    new: bool = Field(description="false: with --unique, an equal job is there already")
    state: State = Field(description="the state of a job, see states.md")
    request: Amounts
    queue: str = Field(description="its queue")
    priority: JobPriority = Field(description="0 to 9, higher first")


class Ended(Closed):
    """A job that was waited for."""

    id: JobId = Field(description="the id of the job, which is that of the Celery task")
    state: State = Field(description="the state of a job, see states.md")
    ended: bool = Field(description="false: it had not ended after --timeout")
    attempt: Natural = Field(description="number of the newest attempt; 0 before the first")
    worker: str | None = Field(description="the worker of the newest attempt; null: none")


class PrintedEnds(RootModel[list[Ended]]):
    """Ends of the jobs, in the order of the ids."""
