"""Models of the API's answers, for OpenAPI. Tests hold the answers of running stores to them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from celery_capacity.routing.model.states import State

Amount = int | float


class Closed(BaseModel):
    """An object without other members than these."""

    model_config = ConfigDict(extra="forbid")


class Problem(BaseModel):
    """An error (RFC 9457), with what to do."""

    type: str = Field(description="a stable URN of the kind of error, or about:blank")
    title: str = Field(description="the kind of error in one phrase")
    status: int = Field(description="the status of the answer")
    detail: str | None = Field(None, description="what was wrong, and what to do")
    reference: str | None = Field(None, description="the stable name of the kind of error")
    value: str | None = Field(None, description="the wrong value")
    advice: str | None = Field(None, description="what to do")


class Named(Closed):
    """A resource with units of its own."""

    total: int = Field(description="published by live workers")
    allocated: int = Field(description="held by admitted jobs")


class Resources(Closed):
    """Sums over all live workers: CPUs as numbers, memory in bytes."""

    total_cpus: Amount
    allocated_cpus: Amount
    available_cpus: Amount
    utilization_percent: Amount
    active_workers: int
    total_memory: int
    allocated_memory: int
    available_memory: int
    total_slots: int
    allocated_slots: int
    available_slots: int
    named: dict[str, Named]
    waiting_jobs: int


class Worker(Closed):
    """A live worker."""

    name: str
    status: Literal["ready", "cordoned", "draining"]
    cpus: Amount
    allocated_cpus: Amount
    heartbeat_age_seconds: float | None
    memory: int
    allocated_memory: int
    slots: int
    allocated_slots: int
    named: dict[str, Named]
    queues: list[str]
    labels: dict[str, str]
    hostname: str | None
    pid: int | None
    incarnation: str
    started_at: str | None
    version: str | None
    cordon: dict[str, Any] | None
    left_seconds: float | None


class BacklogLine(Closed):
    """The waiting jobs of one queue and one request."""

    queue: str
    request: dict[str, Amount]
    alternatives: list[dict[str, Amount]]
    where: str | None
    waiting: int
    oldest_seconds: float | None
    unknown_task: str | None
    blocked: str | None


class Dashboard(Closed):
    """The cluster at a moment: the object of `cluster --json`."""

    resources: Resources
    workers: list[Worker]
    next_after: str | None
    backlog: list[BacklogLine]
    pauses: list[dict[str, Any]]
    cordons: list[dict[str, Any]]
    keys: list[dict[str, Any]]
    counters: dict[str, int]
    source: Literal["ledger", "postgres"]
    unapplied: int | None
    unapplied_seconds: float | None
    memory_short: bool
    reconciled_at: str | None = Field(description="end of the last reconcile; null where none is noted")
    quarantine: dict[str, Any] | None
    at: str


class MissingWorker(Closed):
    """A worker that is missing. `suspect`: it sends no heartbeat, and is soon lost."""

    name: str
    status: Literal["suspect", "lost"]
    hostname: str | None
    since: str = Field(description="time of its last heartbeat, or when it was lost")


class Workers(Closed):
    """A page of the live workers, by name."""

    workers: list[Worker]
    missing: list[MissingWorker] = Field(description="the workers that were lost in the last day, or soon are")
    next_cursor: str | None = Field(description="cursor of the next page; null on the last one")
    source: Literal["ledger", "postgres"]
    at: str


class Group(Closed):
    """Waiting jobs alike in task, request, queue, priority and tenant."""

    task: str
    queue: str
    priority: int
    tenant: str
    request: dict[str, Amount]
    alternatives: list[dict[str, Amount]] = Field(description="requests of which they need one; empty for one request")
    where: str | None
    waiting: int
    oldest_seconds: float
    first: str = Field(description="id of the job that comes first, whose reason this is")
    why: str | None = Field(description="the reason to wait; null where it was not looked up")
    reasons: list[str] = Field(description="the reason in sentences")
    blocked: bool = Field(description="true: no worker can ever take them, not even an empty one")
    position: int | None = Field(description="jobs that would start before the first")
    estimated_start: str | None


class Backlog(Closed):
    """Waiting jobs: a line for each request as in `cluster --json`, and in groups with reasons."""

    waiting: int
    backlog: list[BacklogLine]
    groups: list[Group]
    pauses: list[dict[str, Any]]
    source: Literal["ledger", "postgres"]
    at: str


class Job(Closed):
    """A job in a list: the object of `jobs --json`."""

    id: str
    name: str
    state: State
    queue: str
    attempt: int
    worker: str | None
    priority: int
    request: dict[str, Amount]
    expected_ms: int | None
    submitted_at: str
    due_at: str | None
    admitted_at: str | None
    started_at: str | None
    finished_at: str | None
    error: str | None
    progress: dict[str, Any] | None


class Jobs(Closed):
    """A page of jobs, the newest first."""

    jobs: list[Job]
    next_cursor: str | None = Field(description="cursor of the next page; null on the last one")


class Attempt(Closed):
    """Admission of a job to a worker."""

    epoch: int
    attempt: int
    worker: str
    incarnation: str
    admitted_at: str | None
    started_at: str | None
    ended_at: str | None
    outcome: str | None
    error: str | None


class JobDetail(Job):
    """Whole job: the object of `job --json`."""

    epoch: int
    declared: bool
    alternatives: list[dict[str, Amount]] = Field(description="requests of which it needs one; empty once it has one")
    retries: int
    losses: int
    root_id: str | None
    parent_id: str | None
    expires_at: str | None
    retry_of: str | None
    retried_as: list[str]
    message_bytes: int | None
    attempts: list[Attempt]
    args: str | None = Field(description="its arguments, with secrets hidden; null where this role may not read them")
    kwargs: str | None
    sender: str | None
    result: str | None
    why: dict[str, Any] | None = Field(description="why it is where it is")


class LogLine(Closed):
    """Line that the body of a job logged or printed: the object of `logs --json`."""

    job: str
    epoch: int
    attempt: int
    number: int = Field(description="from 1 on in the attempt; a gap is a line that is lost, or not kept any more")
    time: str
    level: str
    logger: str
    message: str


class LogLines(Closed):
    """Lines of a job in their order."""

    lines: list[LogLine]
    cursor: str | None = Field(description="position of the last line, for `after`; null without a line")


class TaskFigures(Closed):
    """A task's newest jobs in figures."""

    name: str
    jobs: int
    waiting: int
    running: int
    succeeded: int
    failed: int
    failure_percent: float | None
    wait_p50_seconds: float | None
    wait_p95_seconds: float | None
    run_p50_seconds: float | None
    run_p95_seconds: float | None
    run_trend_seconds: list[float] = Field(description="median run times, from the oldest jobs to the newest")
    cpus_least: Amount = Field(description="least CPUs that a job asks for; cpus_most: most")
    cpus_most: Amount
    memory_least: int = Field(description="least memory that a job asks for; memory_most: most")
    memory_most: int


class Tasks(Closed):
    """The figures of each task."""

    tasks: list[TaskFigures]
    sample: int = Field(description="jobs that were counted")
    limit: int = Field(description="newest jobs that are counted at most")


class Minute(Closed):
    """A minute of the cluster, with its numbers at its end."""

    begin: str = Field(alias="from", description="its beginning")
    allocated_cpus: Amount
    waiting: int
    started_per_second: float
    ended_per_second: float
    wait_p50_seconds: float | None = Field(description="of jobs that started in it; null: none did")
    wait_p95_seconds: float | None


class LastHour(Closed):
    """The last hour, the oldest minute first."""

    minutes: list[Minute]
    seconds: int = Field(description="length of a minute")
    whole: bool = Field(description="false: so many jobs ended that only the last minutes are told")
    total_cpus: Amount = Field(description="of the cluster now")
    since: str
    until: str


class Run(Closed):
    """Attempt of a job on a worker."""

    job: str
    task: str
    epoch: int
    attempt: int
    worker: str
    cpus: Amount = Field(description="CPUs that the job asks for now")
    admitted_at: str
    started_at: str | None
    ended_at: str | None = Field(description="null: it has not ended")
    outcome: str | None


class RunWorker(Closed):
    """A worker of the runs, or another one that lives."""

    name: str
    cpus: Amount
    status: Literal["ready", "draining", "left", "lost"]


class Runs(Closed):
    """Runs in a stretch of time, the last admitted first."""

    runs: list[Run]
    workers: list[RunWorker]
    whole: bool = Field(description="false: there are more runs, and the earliest are left out")
    since: str
    until: str


class Waited(Closed):
    """Jobs that waited at a moment, alike in task, request and priority."""

    task: str
    priority: int
    request: dict[str, Amount]
    jobs: int
    waited_seconds: float = Field(description="of the job that had waited longest")
    first: str = Field(description="id of the job that was submitted first")
    why: str | None = Field(description="the reason not to run there; null: it had room, and history tells no more")
    short: dict[str, Amount] = Field(description="the amounts that were missing there")


class Hole(Closed):
    """A worker at a moment: its free room, and the jobs that waited."""

    worker: str
    at: str
    free: dict[str, Amount] | None = Field(description="null: the worker did not live then")
    waited: list[Waited]


class JobChanged(Closed):
    """Data of an event `job`."""

    job: str
    state: State
    attempt: int
    worker: str | None
    at: str | None


class Health(Closed):
    """Answer of a process that serves."""

    status: Literal["ok"]
