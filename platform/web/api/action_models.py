"""Models of the actions: what a request may have, and what is answered."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field

from celery_capacity.platform.web.api.models import Closed, Problem
from celery_capacity.routing.model.identifiers import MAX_JOB_ID, MAX_QUEUE_NAME, MAX_TENANT_NAME, MAX_WORKER_NAME

#: Jobs that one request acts on, or submits, at most.
MAX_MANY = 1000

Text = Annotated[str, Field(max_length=500)]
Name = Annotated[str, Field(max_length=300)]
JobId = Annotated[str, Field(max_length=MAX_JOB_ID)]
WorkerName = Annotated[str, Field(max_length=MAX_WORKER_NAME)]
Queue = Annotated[str, Field(max_length=MAX_QUEUE_NAME)]
Tenant = Annotated[str, Field(max_length=MAX_TENANT_NAME)]
Seconds = Annotated[float, Field(ge=0, le=31_536_000, allow_inf_nan=False)]


def _whole(value: Any) -> Any:
    """Return the integer of a number such as 1.0: JSON has one kind of number, and some languages write the point."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Integer = Annotated[int, BeforeValidator(_whole)]


class Body(Closed):
    """Body of a request. Each member has exactly the type that the document names: `false` is no number."""

    model_config = ConfigDict(strict=True)


class Reason(Body):
    """Why, for others to read."""

    reason: Text | None = None


class Cancel(Body):
    """How to cancel a job."""

    terminate: bool = Field(False, description="end the process of a running job")


class Retry(Body):
    """How to retry a job."""

    again: bool = Field(False, description="also if it succeeded, or was retried already")


class CancelMany(Cancel):
    """Jobs to cancel, which must meet all conditions. Without `confirm` the answer has their number."""

    task: Name | None = None
    group: Name | None = None
    state: Literal["accepted", "waiting", "scheduled", "admitted", "running", "replaced"] | None = None
    confirm: Integer | None = Field(None, ge=0, description="the number of these jobs, as the answer without it has it")


class RetryMany(Retry):
    """Failed and lost jobs to retry. Without `confirm` the answer has their number."""

    task: Name | None = None
    since_seconds: Seconds | None = Field(None, description="ended in the last so many seconds")
    confirm: Integer | None = Field(None, ge=0, description="the number of these jobs, as the answer without it has it")


class Priority(Reason):
    """The new priority of a job."""

    priority: Annotated[Integer, Field(ge=0, le=9)]


class Drain(Reason):
    """How to drain a worker."""

    deadline_seconds: Seconds | None = Field(default=None, description="hand back after that what still runs")


class Part(Body):
    """A part of the backlog: a queue, a task or a tenant; none of them: the whole platform."""

    queue: Queue | None = None
    task: Name | None = None
    tenant: Tenant | None = None


class Pause(Part, Reason):
    """A part of the backlog to pause, and why."""


class Messages(Body):
    """Messages that were set aside, to delete or to put back."""

    ids: list[Annotated[Integer, Field(ge=0, lt=2**31)]] = Field(min_length=1, max_length=MAX_MANY)


class Submit(Body):
    """A job to submit, with the options of `apply_async`. `id`: a repeated request with it makes no second job."""

    task: Annotated[str, Field(min_length=1, max_length=255)]
    args: list[Any] = Field(default_factory=list)
    kwargs: dict[str, Any] = Field(default_factory=dict)
    id: JobId | None = None
    cpus: int | float | str | None = None
    memory: Integer | str | None = None
    gpus: Integer | None = None
    resources: dict[str, Integer] | None = None
    requests: list[dict[str, Any]] | None = Field(default=None, description="alternatives in order")
    expected: int | float | str | None = None
    where: dict[str, str] | None = None
    worker: WorkerName | None = None
    exclusive: bool | None = None
    placement: Literal["pack", "spread"] | None = None
    queue: Queue | None = None
    tenant: Tenant | None = None
    priority: Annotated[Integer, Field(ge=0, le=9)] | None = None
    countdown: Seconds | None = None
    expires: Seconds | None = None
    unique: bool | None = None
    after: list[JobId] | None = None
    limit: dict[str, Integer] | None = None
    rate: dict[str, str] | None = None


class SubmitMany(Body):
    """Jobs to submit."""

    jobs: list[Submit] = Field(min_length=1, max_length=MAX_MANY)


class Submitted(Closed):
    """A job that was submitted, or why it was not."""

    id: str
    new: bool = Field(description="false: there was a job with this id, or an equal one where it is to be unique")
    refused: Problem | None


class SubmittedMany(Closed):
    """Result of each submission, in their order."""

    jobs: list[Submitted]


class Results(Closed):
    """Result for each target."""

    results: list[dict[str, Any]]


class Action(Closed):
    """An action of an operator."""

    seq: int
    action: str
    targets: list[str]
    number: int
    by: str
    via: Literal["api", "cli", "page"]
    at: str
    details: dict[str, Any]
    outcome: Literal["done", "partly", "refused"] | None
    ended_at: str | None


class Audit(Closed):
    """Actions, the newest first."""

    actions: list[Action]
    next_cursor: str | None


class SetAside(Closed):
    """A message that was set aside."""

    id: int
    queue: str
    reason: str
    worker: str | None
    seen_at: str


class Quarantine(Closed):
    """Messages that were set aside, the newest first."""

    messages: list[SetAside]
    next_cursor: str | None
