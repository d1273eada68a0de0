"""Models of the canvas around a job, for OpenAPI."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from celery_capacity.platform.documents.parts import Closed
from celery_capacity.routing.model.states import State


class WorkflowJob(Closed):
    """A job of a workflow."""

    id: str = Field(description="the id of the job")
    name: str = Field(description="the name of its task")
    state: State | None = Field(description="null: this step is not submitted yet")
    group: str | None = Field(description="Celery's id of its group or chord")


class WorkflowLink(Closed):
    """A link between two jobs. A `child` was published by the first; a `chord` leads to the body of a chord."""

    first: str = Field(alias="from", description="id of the job where it begins")
    to: str = Field(description="id of the job where it ends")
    kind: Literal["child", "chord", "replaces"] = Field(description="the kind of link")


class Retried(Closed):
    """A job that was repeated, or repeats one."""

    id: str = Field(description="the id of the job")
    state: State | None = Field(description="null: it is in the archive")


class Workflow(Closed):
    """The canvas around a job, as far as the rows and the messages tell."""

    root: str = Field(description="id of the first job of the canvas")
    jobs: list[WorkflowJob] = Field(description="its jobs, and the steps ahead")
    links: list[WorkflowLink] = Field(description="the links between them")
    whole: bool = Field(description="false: the workflow has more jobs than were read")
    retries: list[Retried] = Field(description="the job that was repeated first, and its retries; empty without any")
