"""The cluster at a moment: resources, workers, and the backlog."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import Field

from celery_capacity.platform.documents.parts import (
    Amount,
    Amounts,
    Closed,
    CordonInForce,
    Named,
    Natural,
    PauseInForce,
    Positive,
    Time,
    Unreadable,
    one_of,
)
from celery_capacity.routing.model.reasons import EXPLAINED, Reason
from celery_capacity.routing.model.states import Store

#: Reasons for which no live worker can take a job, not even an empty one.
BLOCKED: Final = (Reason.NO_TASK, Reason.NO_QUEUE, Reason.NO_LABEL, Reason.UNKNOWN_RESOURCE, Reason.TOO_LARGE)

Blocked = Annotated[str, one_of(BLOCKED)]
Why = Annotated[str, one_of(EXPLAINED)]
Alternatives = Annotated[
    list[Amounts],
    Field(description="the requests of which they need one, in order; empty where they have one request"),
]
Where = Annotated[str | None, Field(description="the labels and the worker that they ask for, in words; null for none")]
Source = Annotated[Store, Field(description="the store that the numbers come from")]
At = Annotated[Time, Field(description="the moment, by the clock of the store, ISO 8601 in UTC")]


class Resources(Closed):
    """Sums over all live workers: CPUs as numbers, memory in bytes."""

    total_cpus: Amount = Field(description="CPUs published")
    allocated_cpus: Amount = Field(description="CPUs held by admitted jobs")
    available_cpus: Amount = Field(description="CPUs that are free; never negative")
    utilization_percent: Amount = Field(description="allocated CPUs in percent of all; 0 without any")
    active_workers: Natural = Field(description="live workers")
    total_memory: Natural = Field(description="bytes published")
    allocated_memory: Natural = Field(description="bytes held")
    available_memory: Natural = Field(description="bytes free; never negative")
    total_slots: Natural = Field(description="slots published")
    allocated_slots: Natural = Field(description="slots held")
    available_slots: Natural = Field(description="slots free; never negative")
    named: dict[str, Named] = Field(description="GPUs and named resources by name")
    waiting_jobs: Natural = Field(description="jobs in the backlog")


class Worker(Closed):
    """A live worker."""

    name: str = Field(description="its name: NODE_NAME, else that of -n, else the host's")
    status: Literal["ready", "cordoned", "draining"] = Field(description="draining or cordoned: it takes nothing more")
    cpus: Amount = Field(description="CPUs that it publishes")
    allocated_cpus: Amount = Field(description="CPUs held by admitted jobs")
    heartbeat_age_seconds: Amount | None = Field(
        description="seconds since its last heartbeat; null where nobody noted one"
    )
    memory: Natural = Field(description="bytes that it publishes")
    allocated_memory: Natural = Field(description="bytes held by admitted jobs")
    slots: Natural = Field(description="slots of its pool")
    allocated_slots: Natural = Field(description="slots held by admitted jobs")
    named: dict[str, Named] = Field(description="GPUs and named resources by name")
    queues: list[str] = Field(description="the queues that it serves, by name")
    hostname: str | None = Field(description="the machine")
    pid: Positive | None = Field(description="process id of its main process on that machine")
    incarnation: str = Field(description="the id of this life of the worker")
    started_at: Time | None = Field(description="when this life began, ISO 8601 in UTC")
    version: str | None = Field(description="version of celery-capacity that it runs")
    cordon: CordonInForce | None = Field(description="the operator's order that holds it back")
    left_seconds: Amount | None = Field(description="seconds until it ends (PLATFORM_LIFETIME); null: no end is known")
    labels: dict[str, str] = Field(description="its labels (PLATFORM_LABELS), value by key")


class BacklogLine(Closed):
    """The waiting jobs of one queue and one request."""

    queue: str = Field(description="the queue that they are in")
    request: Amounts
    alternatives: Alternatives
    where: Where
    waiting: Positive = Field(description="how many")
    unknown_task: str | None = Field(description="their task, where no live worker has registered it; else null")
    oldest_seconds: Amount | None = Field(description="seconds since the first of them was submitted")
    blocked: Blocked | None = Field(
        description="why no live worker can take these jobs, not even an empty one; null where one can"
    )


class KeyInUse(Closed):
    """A key that holds jobs back by its limit."""

    key: str = Field(description="the key")
    holding: Natural = Field(description="jobs that hold it")
    waiting: Positive = Field(description="jobs that wait for it, at most 10,000")
    more: bool = Field(description="true: more jobs than these wait for it")


class Dashboard(Closed):
    """The cluster at a moment."""

    resources: Resources
    workers: list[Worker] = Field(description="the live workers by name")
    next_after: str | None = Field(
        description="name behind which the next page of workers begins, as --after takes it; null on the last page,"
        " and without --limit"
    )
    backlog: list[BacklogLine] = Field(description="what waits, a line for each queue and request")
    pauses: list[PauseInForce] = Field(description="parts of the backlog of which nothing starts")
    cordons: list[CordonInForce] = Field(description="the orders that hold workers back, also of workers that are down")
    keys: list[KeyInUse] = Field(description="the keys that hold the most jobs back by their limits, at most 20")
    counters: dict[str, Annotated[int, Field(ge=0, description="how often")]] = Field(
        description="what the ledger counted since it was opened, by name; empty where Postgres answered"
    )
    source: Source
    unapplied: Natural | None = Field(
        description="transitions that Postgres does not have yet; null where Postgres answered"
    )
    unapplied_seconds: Amount | None = Field(
        description="seconds since the oldest of these was noted, 0 without one; null where Postgres answered"
    )
    memory_short: bool = Field(
        description="true: Redis has used nearly all of its maxmemory, so jobs that find no room stay in Postgres"
    )
    reconciled_at: Time | None = Field(
        description="end of the last reconcile, ISO 8601 in UTC; null where none is noted, or Postgres answered"
    )
    quarantine: Unreadable | None = Field(description="null where Postgres does not answer")
    at: At


class ChosenWorkers(Closed):
    """The live workers that were chosen."""

    workers: list[Worker] = Field(description="the workers, in the order of --sort")
    source: Source
    at: At


class Group(Closed):
    """Waiting jobs alike in task, request, queue, priority and tenant."""

    task: str = Field(description="the task of these jobs")
    queue: str = Field(description="the queue that they are in")
    priority: int = Field(description="their priority; greater values come first")
    tenant: str = Field(description="their tenant")
    request: Amounts
    alternatives: Alternatives
    where: Where
    waiting: Positive = Field(description="how many")
    oldest_seconds: Amount = Field(description="seconds since the first of them was submitted")
    first: str = Field(description="id of the job that comes first, whose reason this is")
    why: Why | None = Field(description="the reason to wait; null where it was not looked up")
    reasons: list[str] = Field(description="the reason in sentences")
    blocked: bool = Field(description="true: no worker can ever take them, not even an empty one")
    position: Natural | None = Field(description="jobs that would start before the first; null where that is unknown")
    estimated_start: str | None = Field(description="when the first starts, ISO 8601 in UTC; null without an estimate")


class Backlog(Closed):
    """The waiting jobs and their reasons."""

    waiting: Natural = Field(description="jobs in the backlog")
    backlog: list[BacklogLine] = Field(description="what waits, a line for each queue and request")
    groups: list[Group] = Field(
        description="the backlog in groups, at most 100; first those that no worker can ever take"
    )
    pauses: list[PauseInForce] = Field(description="parts of the backlog of which nothing starts")
    source: Source
    at: At


class Top(Closed):
    """The cluster at a moment: workers, and what waits."""

    resources: Resources
    workers: list[Worker] = Field(description="the workers, in the order of --sort")
    groups: list[Group] | None = Field(
        description="the backlog in groups, at most 100; null where Postgres does not answer"
    )
    pauses: list[PauseInForce] = Field(description="parts of the backlog of which nothing starts")
    source: Source
    at: At
