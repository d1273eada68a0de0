"""Models of the answers that only the API gives, for OpenAPI. Tests hold the answers of running stores to them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from celery_capacity.platform.documents.cluster import At, Source, Why, Worker
from celery_capacity.platform.documents.job import Job, LogLine
from celery_capacity.platform.documents.parts import Amount, Amounts, Closed, Natural, Positive, Time
from celery_capacity.routing.model.states import Outcome, State

NextCursor = Annotated[str | None, Field(description="cursor of the next page; null on the last one")]


class MissingWorker(Closed):
    """A worker that is missing. `suspect`: it sends no heartbeat, and is soon lost."""

    name: str = Field(description="its name")
    status: Literal["suspect", "lost"] = Field(description="lost: its jobs were taken from it")
    hostname: str | None = Field(description="the machine")
    since: str = Field(description="time of its last heartbeat, or when it was lost")


class Workers(Closed):
    """A page of the live workers, by name."""

    workers: list[Worker] = Field(description="the live workers of this page")
    missing: list[MissingWorker] = Field(description="the workers that were lost in the last day, or soon are")
    next_cursor: NextCursor
    source: Source
    at: At


class Jobs(Closed):
    """A page of jobs, the newest first."""

    jobs: list[Job] = Field(description="the jobs of this page")
    next_cursor: NextCursor


class LogLines(Closed):
    """Lines of a job in their order."""

    lines: list[LogLine] = Field(description="the lines, the oldest first")
    cursor: str | None = Field(description="position of the last line, for `after`; null without a line")


class Minute(Closed):
    """A minute of the cluster, with its numbers at its end."""

    begin: str = Field(alias="from", description="its beginning, ISO 8601 in UTC")
    allocated_cpus: Amount = Field(description="CPUs held by admitted jobs")
    waiting: Natural = Field(description="jobs in the backlog")
    started_per_second: Amount = Field(description="jobs that started, for each second")
    ended_per_second: Amount = Field(description="jobs that ended, for each second")
    wait_p50_seconds: Amount | None = Field(description="median wait of jobs that started in it; null: none did")
    wait_p95_seconds: Amount | None = Field(description="wait that 5 % of them exceed")


class LastHour(Closed):
    """The last hour, the oldest minute first."""

    minutes: list[Minute] = Field(description="the minutes")
    seconds: Positive = Field(description="length of a minute")
    whole: bool = Field(description="false: so many jobs ended that only the last minutes are told")
    total_cpus: Amount = Field(description="CPUs of the cluster now")
    since: str = Field(description="beginning of the first minute, ISO 8601 in UTC")
    until: str = Field(description="end of the last minute, ISO 8601 in UTC")


class Run(Closed):
    """Attempt of a job on a worker."""

    job: str = Field(description="the id of the job")
    task: str = Field(description="the name of its task")
    epoch: Natural = Field(description="epoch of the ledger that admitted it")
    attempt: Positive = Field(description="number of the attempt")
    worker: str = Field(description="the worker")
    cpus: Amount = Field(description="CPUs that the job asks for now")
    admitted_at: str = Field(description="when it was admitted, ISO 8601 in UTC")
    started_at: str | None = Field(description="when it started; null: it has not")
    ended_at: str | None = Field(description="when it ended; null: it has not")
    outcome: Outcome | None = Field(description="how it ended; null while it is open")


class RunWorker(Closed):
    """A worker of the runs, or another one that lives."""

    name: str = Field(description="its name")
    cpus: Amount = Field(description="CPUs that it publishes, or published last")
    status: Literal["ready", "draining", "left", "lost"] = Field(description="left: it has ended by itself")


class Runs(Closed):
    """Runs in a stretch of time, the last admitted first."""

    runs: list[Run] = Field(description="the runs")
    workers: list[RunWorker] = Field(description="their workers, and the live ones")
    whole: bool = Field(description="false: there are more runs, and the earliest are left out")
    since: str = Field(description="beginning of the stretch, ISO 8601 in UTC")
    until: str = Field(description="end of the stretch, ISO 8601 in UTC")


class Waited(Closed):
    """Jobs that waited at a moment, alike in task, request and priority."""

    task: str = Field(description="the task of these jobs")
    priority: int = Field(description="their priority; greater values come first")
    request: Amounts
    jobs: Positive = Field(description="how many")
    waited_seconds: Amount = Field(description="seconds that the job of the longest wait had waited")
    first: str = Field(description="id of the job that was submitted first")
    why: Why | None = Field(description="the reason not to run there; null: it had room, and history tells no more")
    short: Amounts = Field(description="the amounts that were missing there")


class Hole(Closed):
    """A worker at a moment: its free room, and the jobs that waited."""

    worker: str = Field(description="its name")
    at: str = Field(description="the moment, ISO 8601 in UTC")
    free: Amounts | None = Field(description="the free amounts; null: the worker did not live then")
    waited: list[Waited] = Field(description="the jobs that waited, in groups")


class JobChanged(Closed):
    """Data of an event `job`."""

    job: str = Field(description="the id of the job")
    state: State = Field(description="its new state")
    attempt: Natural = Field(description="number of its newest attempt; 0 before the first")
    worker: str | None = Field(description="the worker of this attempt")
    at: Time | None = Field(description="when, ISO 8601 in UTC; null where that is unknown")


class Health(Closed):
    """Answer of a process that serves."""

    status: Literal["ok"]
