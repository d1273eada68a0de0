"""Models of the canvas around a job, for OpenAPI."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from celery_capacity.platform.web.api.models import Closed
from celery_capacity.routing.model.states import State


class WorkflowJob(Closed):
    """A job of a workflow."""

    id: str
    name: str
    state: State | None = Field(description="null: this step is not submitted yet")
    group: str | None = Field(description="Celery's id of its group or chord")


class WorkflowLink(Closed):
    """A link between two jobs. A `child` was published by the first; a `chord` leads to the body of a chord."""

    first: str = Field(alias="from")
    to: str
    kind: Literal["child", "chord", "replaces"]


class Retried(Closed):
    """A job that was repeated, or repeats one."""

    id: str
    state: State | None = Field(description="null: it is in the archive")


class Workflow(Closed):
    """The canvas around a job, as far as the rows and the messages tell."""

    root: str
    jobs: list[WorkflowJob]
    links: list[WorkflowLink]
    whole: bool = Field(description="false: the workflow has more jobs than were read")
    retries: list[Retried] = Field(description="the job that was repeated first, and its retries; empty without any")
