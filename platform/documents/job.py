"""Jobs: a line of a list, a whole job, its log lines and changes, and the figures of a task."""

from __future__ import annotations

from pydantic import Field, RootModel

from celery_capacity.platform.documents.parts import (
    Amount,
    Amounts,
    Closed,
    JobId,
    JobPriority,
    Natural,
    Positive,
    Time,
    Unreadable,
)
from celery_capacity.platform.documents.reasons import Explanation
from celery_capacity.routing.model.states import Outcome, State


class Progress(Closed):
    """Progress of a job, as its task reported."""

    current: Amount = Field(description="done so far, in the task's own unit")
    total: Amount | None = Field(description="all that is to be done; null: not known")
    message: str | None = Field(description="a few words of the task")
    at: Time = Field(description="when the task reported it, ISO 8601 in UTC")


class Job(Closed):
    """A job in a list."""

    id: JobId = Field(description="the id of the job, which is that of the Celery task")
    name: str = Field(description="the name of the task")
    state: State = Field(description="the state of a job, see states.md")
    queue: str = Field(description="the queue that it was sent to")
    attempt: Natural = Field(description="number of the newest attempt; 0 before the first")
    worker: str | None = Field(description="the worker of the newest attempt")
    priority: JobPriority = Field(description="0 to 9, higher first")
    request: Amounts
    expected_ms: Natural | None = Field(
        description="milliseconds that it is expected to run, 0 where nobody knows; null in the archive"
    )
    submitted_at: Time = Field(description="when it was accepted, ISO 8601 in UTC")
    due_at: Time | None = Field(description="the time before which it must not start, ISO 8601 in UTC")
    admitted_at: Time | None = Field(description="when the newest attempt was admitted, ISO 8601 in UTC")
    started_at: Time | None = Field(description="when the newest attempt started, ISO 8601 in UTC")
    finished_at: Time | None = Field(description="when the job came to its final state, ISO 8601 in UTC")
    error: str | None = Field(description="the error of a job that did not succeed, cut to what is stored")
    progress: Progress | None = Field(
        description="how far the job has come, as its task reported; null: it reported nothing, or starts anew"
    )


class PrintedJobs(RootModel[list[Job] | Natural | Unreadable]):
    """Newest jobs, newest first.

    With --set-aside, the messages of which no job was made; with --count, the number of jobs.
    """


class Attempt(Closed):
    """An attempt: the admission of a job to a worker."""

    epoch: Natural = Field(description="epoch of the ledger that admitted it")
    attempt: Positive = Field(description="its number")
    worker: str = Field(description="the worker")
    incarnation: str = Field(description="the life of that worker")
    admitted_at: Time = Field(description="when it was admitted, ISO 8601 in UTC")
    started_at: Time | None = Field(description="when it started, ISO 8601 in UTC")
    ended_at: Time | None = Field(description="when it ended, ISO 8601 in UTC")
    outcome: Outcome | None = Field(description="how it ended; null while it is open")
    error: str | None = Field(description="its error")


class JobDetail(Job):
    """A job with its attempts, and why it waits."""

    alternatives: list[Amounts] = Field(
        description="the requests of which it needs one, in order; empty where it has one request, or has taken one"
    )
    epoch: Natural = Field(description="epoch of the newest attempt; 0 before the first")
    declared: bool = Field(description="false where nobody knew the task, so that the request is the default")
    retries: Natural = Field(description="Celery retries so far")
    losses: Natural = Field(description="attempts that were lost with their worker")
    root_id: str | None = Field(description="the first task of its workflow")
    parent_id: str | None = Field(description="the task that published it")
    expires_at: Time | None = Field(description="the time after which it must not start, ISO 8601 in UTC")
    retry_of: str | None = Field(description="the job that this one repeats; null: none")
    retried_as: list[str] = Field(description="the jobs that repeat this one, oldest first")
    message_bytes: Natural | None = Field(description="bytes of its message; null for who may not read messages")
    args: str | None = Field(
        description="the positional arguments as text: whole, secrets hidden; null for who may not read messages"
    )
    kwargs: str | None = Field(description="the named arguments, like args")
    sender: str | None = Field(description="the process that sent it")
    result: str | None = Field(
        description="the result of a job that succeeded as text: whole, secrets hidden; null where none is kept"
    )
    attempts: list[Attempt] = Field(description="its attempts, oldest first")
    why: Explanation | None = Field(description="why it is where it is")


class LogLine(Closed):
    """A line that the body of a job logged or printed."""

    job: JobId = Field(description="the id of the job")
    epoch: Natural = Field(description="the life of the ledger in which the attempt was admitted")
    attempt: Natural = Field(description="number of the attempt whose body wrote the line")
    number: Positive = Field(description="from 1 on in the attempt; a gap is a line that is lost, or not kept any more")
    time: str = Field(description="when, ISO 8601 in UTC")
    level: str = Field(description="such as INFO")
    logger: str = Field(description="name of the logger; celery.redirected for printed text")
    message: str = Field(
        description="its first 2,000 characters, with secrets hidden; a traceback as further lines of it"
    )


class Change(Closed):
    """A line: a job came into a state."""

    job: JobId = Field(description="the id of the job")
    task: str | None = Field(description="its task; null where Postgres does not answer")
    state: State = Field(description="the state of a job, see states.md")
    attempt: Natural = Field(description="number of its admissions")
    worker: str | None = Field(description="the worker of this attempt; null before the first, and where it is unknown")
    at: str | None = Field(
        description="when, ISO 8601 in UTC; null for a change that was over when the job was looked at"
    )


class TaskFigures(Closed):
    """A task's newest jobs in figures."""

    name: str = Field(description="the task")
    jobs: Positive = Field(description="its jobs among those that were counted")
    waiting: Natural = Field(description="accepted, waiting or scheduled")
    running: Natural = Field(description="admitted or running")
    succeeded: Natural = Field(description="succeeded")
    failed: Natural = Field(description="failed or lost")
    failure_percent: Amount | None = Field(
        description="failed in percent of those that succeeded or failed; null without any"
    )
    wait_p50_seconds: Amount | None = Field(description="median of the waits")
    wait_p95_seconds: Amount | None = Field(description="wait that 5 % exceed")
    run_p50_seconds: Amount | None = Field(description="median of the run times")
    run_p95_seconds: Amount | None = Field(description="run time that 5 % exceed")
    run_trend_seconds: list[Amount] = Field(
        description="medians of the run times of equal parts of the jobs that ran, the oldest part first; at most 12"
    )
    cpus_least: Amount = Field(description="least CPUs that a job asks for")
    cpus_most: Amount = Field(description="most CPUs that a job asks for")
    memory_least: Natural = Field(description="least bytes of memory that a job asks for; 0: none")
    memory_most: Natural = Field(description="most bytes of memory that a job asks for")


class Tasks(Closed):
    """The figures of each task."""

    tasks: list[TaskFigures] = Field(description="the tasks, first the one with the most jobs")
    sample: Natural = Field(description="jobs of these tasks that were counted")
    limit: Positive = Field(description="newest jobs of all tasks that are counted at most")
