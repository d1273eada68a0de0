"""Orders of operators to workers and to parts of the backlog, and the rules of tenants."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, RootModel

from celery_capacity.platform.documents.parts import Closed, CordonInForce, Natural, PauseInForce
from celery_capacity.routing.policy.pauses import Kind


class OrderedWorker(Closed):
    """A worker after an order."""

    worker: str = Field(description="its name")
    status: Literal["cordoned", "draining", "uncordoned"] = Field(description="its status by the operator's orders")
    cordon: CordonInForce | None = Field(description="the order that holds it back")
    before: bool = Field(description="true: it was cordoned before")
    running: Natural = Field(description="jobs that it holds now")
    live: bool = Field(description="true: it has sent a heartbeat lately")
    applied: bool = Field(description="false: Postgres has it, and the ledger takes it as soon as it answers")


class PrintedCordons(RootModel[list[OrderedWorker]]):
    """The workers that were cordoned."""


class PrintedUncordons(RootModel[list[OrderedWorker]]):
    """The workers that were uncordoned."""


class PrintedDrains(RootModel[list[OrderedWorker]]):
    """The workers that were told to become empty."""


class PausedPart(Closed):
    """A part of the backlog after a pause or its end."""

    kind: Kind = Field(description="the kind of that part of the backlog")
    name: str = Field(description="the queue, the task or the tenant; empty for the platform")
    paused: bool = Field(description="true: nothing of it starts")
    pause: PauseInForce | None = Field(description="the pause that holds now")
    before: bool = Field(description="true: it was paused before")
    applied: bool = Field(description="false: Postgres has it, and the ledger takes it as soon as it answers")


class Tenant(Closed):
    """A tenant."""

    name: str = Field(description="the tenant")
    weight: int = Field(description="its part beside the parts of others")
    nominal: dict[str, float] = Field(description="amounts of its own by resource, lent to others while it is idle")
    quota: dict[str, float] = Field(description="amounts by resource that its jobs never hold more of")
    max_waiting: int = Field(description="waiting jobs from which on a submission is refused; 0: no limit")
    used: dict[str, float] = Field(description="amounts by resource that its jobs hold, by Postgres")
    share: float = Field(description="the largest part of any resource that it holds, from 0 to 1")
    waiting: int = Field(description="its waiting jobs")
    ruled: bool = Field(description="false: it has no rule of its own")


class RuledTenant(Tenant):
    """A tenant whose rule was made or removed."""

    before: bool = Field(description="true: it had a rule before")
    applied: bool = Field(description="false: Postgres has it, and the ledger takes it as soon as it answers")


class Tenants(Closed):
    """All tenants."""

    tenants: list[Tenant] = Field(description="the tenants by name")
