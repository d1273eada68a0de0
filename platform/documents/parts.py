"""Parts that several documents share, and the types of their members."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from celery_capacity.routing.model.reasons import Refusal
from celery_capacity.routing.policy.pauses import Kind

#: Times as all documents have them: ISO 8601 in UTC.
TIME: Final = r"^\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}(\.\d+)?\+00:00$"

Natural = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
#: CPUs, seconds or a share: a number that is not negative.
Amount = Annotated[float, Field(ge=0)]
Time = Annotated[str, Field(pattern=TIME)]
JobId = Annotated[str, Field(min_length=1)]
JobPriority = Annotated[int, Field(ge=0, le=9)]


class Closed(BaseModel):
    """An object without other members than these."""

    model_config = ConfigDict(extra="forbid")


def one_of(values: Iterable[str | Enum]) -> WithJsonSchema:
    """Return the schema of a text that is one of these words."""
    words = [str(value.value) if isinstance(value, Enum) else value for value in values]
    return WithJsonSchema({"type": "string", "enum": words})


def _without_default(schema: dict[str, Any]) -> None:
    schema.pop("default", None)


def absent(description: str) -> Any:
    """Return the field of a member that may be missing, and is never null."""
    return Field(default=None, description=description, json_schema_extra=_without_default)


class Amounts(BaseModel):
    """Amounts that a job needs. Other names than these are named resources, in units of their own."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Annotated[int, Field(ge=0, description="units of a named resource")]]

    cpus: Amount = absent("CPUs")
    memory: Natural = absent("bytes")
    slots: Natural = absent("slots of the worker's pool")
    gpus: Natural = absent("GPUs")


class Named(Closed):
    """A resource, in its own units."""

    total: Natural = Field(description="published by live workers")
    allocated: Natural = Field(description="held by admitted jobs")


class PauseInForce(Closed):
    """A part of the backlog of which nothing starts."""

    kind: Kind = Field(description="the kind of that part")
    name: str = Field(description="the queue, the task or the tenant; empty for the platform")
    by: str = Field(description="the operator: user@host, or the name of --by")
    since: Time = Field(description="when it was paused, ISO 8601 in UTC")
    reason: str | None = Field(description="why, as the operator wrote it")


class CordonInForce(Closed):
    """The order that holds a worker back."""

    worker: str = Field(description="its name")
    by: str = Field(description="the operator: user@host, or the name of --by")
    since: Time = Field(description="when it was given, ISO 8601 in UTC")
    reason: str | None = Field(description="why, as the operator wrote it")
    drains: bool = Field(description="true: the worker is to become empty")
    drain_by: Time | None = Field(
        description="when running jobs are handed back, ISO 8601 in UTC; null: they run to their ends"
    )
    stops: bool = Field(description="true: its process ends once it is empty")


#: Reasons to set a message aside, without the first word of their counters.
SetAsideReason = Annotated[str, one_of(refusal.word for refusal in Refusal if refusal.startswith("set_aside."))]


class UnreadableOfQueue(Closed):
    """Reason for which messages of a queue were set aside."""

    reason: SetAsideReason = Field(description="the last word of its counter, set_aside.REASON")
    detail: str = Field(description="of the newest message, in words")
    queue: str = Field(description="where they came from")
    messages: Positive = Field(description="how many of those that are kept")
    seen_at: Time = Field(description="when the last came, ISO 8601 in UTC")


class Unreadable(Closed):
    """Messages that nobody could read."""

    messages: Natural = Field(description="how many were set aside so far")
    reasons: list[UnreadableOfQueue] = Field(description="the newest reasons")


class EstimateErrors(Closed):
    """Errors of estimated starts."""

    compared: Positive = Field(description="estimates whose jobs have started, the newest 1,000 at most")
    median_seconds: Amount = Field(description="half of them were off by at most so much")
    p90_seconds: Amount = Field(description="nine of ten were off by at most so much")


class Waits(Closed):
    """Waits of some jobs."""

    mean: Amount = Field(description="seconds")
    p50: Amount = Field(description="seconds")
    p95: Amount = Field(description="seconds")
    max: Amount = Field(description="seconds")
