"""Models of the actions: what a request may have, and what is answered."""

from __future__ import annotations

from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BeforeValidator, ConfigDict, Field

from celery_capacity.platform.documents.errors import Problem
from celery_capacity.platform.documents.parts import Closed, SetAsideReason, one_of
from celery_capacity.platform.web.api.models import NextCursor
from celery_capacity.routing.model.identifiers import MAX_JOB_ID, MAX_QUEUE_NAME, MAX_TENANT_NAME, MAX_WORKER_NAME
from celery_capacity.workers.client.requeue import Became

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

    reason: Text | None = Field(default=None, description="why, for others to read")


class Cancel(Body):
    """How to cancel a job."""

    terminate: bool = Field(default=False, description="end the process of a running job")


class Retry(Body):
    """How to retry a job."""

    again: bool = Field(default=False, description="also if it succeeded, or was retried already")


class CancelMany(Cancel):
    """Jobs to cancel, which must meet all conditions. Without `confirm` the answer has their number."""

    task: Name | None = Field(default=None, description="of this task")
    group: Name | None = Field(default=None, description="of this group or chord")
    state: Literal["accepted", "waiting", "scheduled", "admitted", "running", "replaced"] | None = Field(
        default=None, description="in this state"
    )
    confirm: Integer | None = Field(
        default=None, ge=0, description="the number of these jobs, as the answer without it has it"
    )


class RetryMany(Retry):
    """Failed and lost jobs to retry. Without `confirm` the answer has their number."""

    task: Name | None = Field(default=None, description="of this task")
    since_seconds: Seconds | None = Field(default=None, description="ended in the last so many seconds")
    confirm: Integer | None = Field(
        default=None, ge=0, description="the number of these jobs, as the answer without it has it"
    )


class Priority(Reason):
    """The new priority of a job."""

    priority: Annotated[Integer, Field(ge=0, le=9)] = Field(description="0 to 9, higher first")


class Drain(Reason):
    """How to drain a worker."""

    deadline_seconds: Seconds | None = Field(default=None, description="hand back after that what still runs")


class Part(Body):
    """A part of the backlog: a queue, a task or a tenant; none of them: the whole platform."""

    queue: Queue | None = Field(default=None, description="the queue")
    task: Name | None = Field(default=None, description="the task")
    tenant: Tenant | None = Field(default=None, description="the tenant")


class Pause(Part, Reason):
    """A part of the backlog to pause, and why."""


class Messages(Body):
    """Messages that were set aside, to delete or to put back."""

    ids: list[Annotated[Integer, Field(ge=0, lt=2**31)]] = Field(
        min_length=1, max_length=MAX_MANY, description="their numbers in the quarantine"
    )


class Submit(Body):
    """A job to submit, with the options of `apply_async`. `id`: a repeated request with it makes no second job."""

    task: Annotated[str, Field(min_length=1, max_length=255)] = Field(description="the name of the task")
    args: list[Any] = Field(default_factory=list, description="its positional arguments")
    kwargs: dict[str, Any] = Field(default_factory=dict, description="its named arguments")
    id: JobId | None = Field(default=None, description="the id of the job; without it, a new one is made")
    cpus: int | float | str | None = Field(default=None, description="CPUs")
    memory: Integer | str | None = Field(default=None, description='bytes, or text such as "2GiB"')
    gpus: Integer | None = Field(default=None, description="GPUs")
    resources: dict[str, Integer] | None = Field(default=None, description="units of named resources")
    requests: list[dict[str, Any]] | None = Field(default=None, description="alternatives in order")
    expected: int | float | str | None = Field(
        default=None, description='expected run time: seconds, or text such as "10m"'
    )
    where: dict[str, str] | None = Field(default=None, description="labels that its worker must have")
    worker: WorkerName | None = Field(default=None, description="the only worker that may run it")
    exclusive: bool | None = Field(default=None, description="true: it has its worker alone")
    placement: Literal["pack", "spread"] | None = Field(
        default=None, description="on the worker with the fewest free CPUs that has room, or the most"
    )
    queue: Queue | None = Field(default=None, description="the queue")
    tenant: Tenant | None = Field(default=None, description="the tenant")
    priority: Annotated[Integer, Field(ge=0, le=9)] | None = Field(default=None, description="0 to 9, higher first")
    countdown: Seconds | None = Field(default=None, description="seconds before which it must not start")
    expires: Seconds | None = Field(default=None, description="seconds after which it must not start")
    unique: bool | None = Field(
        default=None, description="true: while an equal job is not over, the answer names that job"
    )
    after: list[JobId] | None = Field(default=None, description="ids of jobs that must succeed first")
    limit: dict[str, Integer] | None = Field(default=None, description="at most so many jobs of a key at once")
    rate: dict[str, str] | None = Field(default=None, description='so many starts of a key in a time, such as "10/m"')


class SubmitMany(Body):
    """Jobs to submit."""

    jobs: list[Submit] = Field(min_length=1, max_length=MAX_MANY, description="the jobs")


class Submitted(Closed):
    """A job that was submitted, or why it was not."""

    id: str = Field(description="the id of the job")
    new: bool = Field(description="false: there was a job with this id, or an equal one where it is to be unique")
    refused: Problem | None = Field(description="why it was not submitted; null: it was")


class SubmittedMany(Closed):
    """Result of each submission, in their order."""

    jobs: list[Submitted] = Field(description="a result for each submission")


Result = TypeVar("Result")


class Results(Closed, Generic[Result]):
    """Result for each target."""

    results: list[Result] = Field(description="a result for each target, in their order")


class Dropped(Closed):
    """Number of messages that were deleted."""

    dropped: Annotated[int, Field(ge=0)] = Field(description="those of the ids that were there")


class RequeuedMessage(Closed):
    """A message that was to be put back."""

    id: int = Field(description="its number in the quarantine")
    result: Annotated[str, one_of(Became)] = Field(description="requeued: it is back; else why it stays")
    detail: str | None = Field(description="why it stays, in a sentence; null: it is back")


class Action(Closed):
    """An action of an operator."""

    seq: int = Field(description="its number in the audit")
    action: str = Field(description="its kind, such as cancel")
    targets: list[str] = Field(description="at most 100 of the jobs, workers or parts of the backlog")
    number: int = Field(description="how many targets it has")
    by: str = Field(description="the operator")
    via: Literal["api", "cli", "page"] = Field(description="how the order came")
    at: str = Field(description="when, ISO 8601 in UTC")
    details: dict[str, Any] = Field(description="its options, and figures of its result")
    outcome: Literal["done", "partly", "refused"] | None = Field(description="null: it has not ended")
    ended_at: str | None = Field(description="when it ended, ISO 8601 in UTC; null: it has not")


class Audit(Closed):
    """Actions, the newest first."""

    actions: list[Action] = Field(description="the actions of this page")
    next_cursor: NextCursor


class SetAside(Closed):
    """A message that was set aside."""

    id: int = Field(description="its number in the quarantine")
    queue: str = Field(description="where it came from")
    reason: SetAsideReason = Field(description="why nobody could read it")
    worker: str | None = Field(description="the worker that set it aside")
    seen_at: str = Field(description="when it came, ISO 8601 in UTC")


class Quarantine(Closed):
    """Messages that were set aside, the newest first."""

    messages: list[SetAside] = Field(description="the messages of this page")
    next_cursor: NextCursor
