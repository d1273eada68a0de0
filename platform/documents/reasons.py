"""Explanations of jobs, as `job --json` and the API tell."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from celery_capacity.platform.documents.cluster import Why
from celery_capacity.platform.documents.parts import (
    Amount,
    Amounts,
    Closed,
    CordonInForce,
    EstimateErrors,
    Natural,
    PauseInForce,
    Positive,
    Time,
)
from celery_capacity.routing.model.states import State
from celery_capacity.routing.simulation.forecast import NoEstimate


class Room(Closed):
    """The room for one resource: CPUs, bytes or units."""

    resource: str = Field(description="cpus, memory, slots, gpus or a named one")
    asked: Amount = Field(description="how much the job needs")
    free: float = Field(description="how much is free; negative where the worker holds more than it has")
    total: Amount = Field(description="how much the worker publishes")


class MissingRoom(Closed):
    """A registered worker that knows the task and serves the queue."""

    worker: str = Field(description="its name")
    admits: bool = Field(description="false: it takes no job now, whatever room it has")
    alone: bool = Field(
        description="true: it is left to a job that must run alone, or this job must and others run there"
    )
    resources: list[Room] = Field(description="a line for each resource of the request")


class Unblocking(Closed):
    """The fewest running jobs on one worker whose ends make room."""

    worker: str = Field(description="their worker")
    jobs: list[str] = Field(description="their ids, the oldest first")


class HoldingKey(Closed):
    """A key that holds a job back."""

    key: str = Field(description="the key")
    limit: Positive | None = Field(description="it starts while fewer jobs hold the key; null: any number")
    rate: str | None = Field(description="the rate of starts of the key, as somebody wrote it")
    holding: Natural = Field(description="jobs that hold the key")
    holders: list[str] = Field(description="the ids of at most ten of them")
    place_in_line: Positive = Field(description="its place among the jobs that wait with equal limits, from 1")
    next_at: Annotated[str, Field(json_schema_extra={"format": "date-time"})] | None = Field(
        description="when the next job of the key may start by its rate; null: now"
    )


class Estimate(Closed):
    """The estimated start of a job, if no job comes later."""

    starts_at: Time | None = Field(description="the estimated start, ISO 8601 in UTC")
    in_seconds: Amount | None = Field(description="seconds from now until then")
    why_not: NoEstimate | None = Field(description="why no start is estimated")
    simulated: Natural = Field(description="waiting jobs whose starts were simulated")
    extrapolated: bool = Field(
        description="true: more jobs are before it, and the time follows from the pace of those simulated"
    )
    errors: EstimateErrors | None = Field(description="how wrong estimated starts were; null: none has been compared")
    without_reservations: bool = Field(description="true: the cluster is too large, and reservations are not simulated")


class OverQuota(Closed):
    """An alternative that a quota holds back."""

    request: Amounts
    resource: str = Field(description="the resource that the quota does not leave")
    asked: float = Field(description="what it needs of the resource")
    free: float = Field(description="what the quota leaves, less than 0 where it was lowered")


class Explanation(Closed):
    """The reason for which a job is where it is, with its figures."""

    job: str = Field(description="its id")
    state: State = Field(description="the state of a job, see states.md")
    why: Why = Field(description="the reason, see commands.md")
    request: Amounts
    declared: bool = Field(description="false where nobody knew the task, so that the request is the default")
    resource: str | None = Field(
        description="the resource that is short: cpus, memory, slots, gpus, a named one, alone, or time in ms"
    )
    asked: Amount | None = Field(description="how much of it the job needs: CPUs, bytes or units")
    free: float | None = Field(
        description="how much of it the worker that comes closest has free, or of a too large job, how much the"
        " largest has; negative where it holds more than it has"
    )
    worker: str | None = Field(description="the worker that comes closest, or has the job")
    place: Positive | None = Field(description="its place among the waiting jobs of the same request, from 1")
    before: Natural | None = Field(description="waiting jobs that come before it, whatever they ask for")
    position: Natural | None = Field(
        description="those of them that would start before it: without paused jobs, and those that no registered"
        " worker could ever take"
    )
    due_at: Time | None = Field(description="the time before which it must not start, ISO 8601 in UTC")
    large_enough: Natural | None = Field(description="live workers that would have room if they were empty")
    live_workers: Natural | None = Field(description="live workers")
    needs: list[str] = Field(description="the jobs that must succeed before it starts, at most ten")
    rate: str | None = Field(description="the rate limit of its task that holds it back, as it was written")
    missing: list[MissingRoom] = Field(
        description="what each of the closest workers lacks, at most five, the closest first"
    )
    more_missing: Natural = Field(description="the number of the other workers that lack room")
    unblocked_by: Unblocking | None = Field(
        description="the fewest running jobs on one worker whose ends make room; null where none are known"
    )
    pause: PauseInForce | None = Field(description="the pause that holds it back")
    key: HoldingKey | None = Field(description="the key that holds it back")
    cordon: CordonInForce | None = Field(description="the cordon of the worker that would take it")
    estimate: Estimate | None = Field(
        description="when it starts, if no job comes later; null: it does not wait for room, or the cluster is too"
        " large"
    )
    tenant: str | None = Field(description="the tenant that comes first, or whose quota is reached")
    over_quota: list[OverQuota] = Field(
        description="with tenant-quota: each alternative that the quota holds back, where the job has several"
    )
    where: str | None = Field(description="the labels and the worker that it asks for, in words")
    exclusive: bool = Field(description="true: it asks to have its worker alone")
    labels: str | None = Field(description="with no-label: the values that workers have of these labels, in words")
