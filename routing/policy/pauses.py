"""Pauses: operators hold back the whole platform, a queue, a task or a tenant. A paused job waits, and is passed over.

A pause concerns starts alone: submissions are accepted, and running jobs go on. Each decision takes the backlog without
the paused jobs (`Pauses.admissible`). So a worker that is kept for a paused job is kept no longer, and later jobs pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, NamedTuple
from urllib.parse import unquote

from celery_capacity.routing.errors import InvalidRequest, show
from celery_capacity.routing.model.identifiers import check_queue_name, check_tenant
from celery_capacity.routing.model.request import KNOWN_EVERYWHERE, Request, split_shape
from celery_capacity.routing.policy.placement import Waiting
from celery_capacity.routing.policy.tenants import tenant_of

#: Characters of the name of a task.
MAX_TASK_NAME: Final = 255


class Kind(StrEnum):
    """Part of the backlog that a pause holds back; the value is the word in tables, JSON and the ledger."""

    PLATFORM = "platform"
    QUEUE = "queue"
    TASK = "task"
    TENANT = "tenant"


class Scope(NamedTuple):
    """Part of the backlog with its name: of a queue, a task or a tenant, "" for the whole platform."""

    kind: Kind
    name: str = ""

    @classmethod
    def of(cls, queue: str | None = None, task: str | None = None, tenant: str | None = None) -> Scope:
        """Return the scope of a queue, a task or a tenant, or of the platform for none. Raise `InvalidRequest`."""
        named = [name for name in (queue, task, tenant) if name is not None]
        if len(named) > 1:
            advice = "Pause one of them at a time; a job waits while one that it belongs to is paused."
            raise InvalidRequest("a queue, a task and a tenant cannot be named together", value=named[0], advice=advice)
        if tenant is not None:
            return cls(Kind.TENANT, check_tenant(tenant))
        if queue is not None:
            return cls(Kind.QUEUE, check_queue_name(queue))
        if task is None:
            return cls(Kind.PLATFORM)
        if not (task.isprintable() and 1 <= len(task) <= MAX_TASK_NAME):
            advice = f"It must be 1 to {MAX_TASK_NAME} printable characters, such as 'tasks.render'."
            raise InvalidRequest(f"task {show(task)} is not valid", value=task, advice=advice)
        if task.startswith(KNOWN_EVERYWHERE):
            advice = "Celery's own tasks do work for other jobs. Pause their queue, or the platform."
            raise InvalidRequest(f"task {show(task)} cannot be paused by its name", value=task, advice=advice)
        return cls(Kind.TASK, task)

    def __str__(self) -> str:
        """Return "platform", "queue render" or "task tasks.render"."""
        return f"{self.kind} {self.name}".rstrip()


@dataclass(frozen=True)
class Pauses:
    """The parts of the backlog that are paused now."""

    scopes: frozenset[Scope] = frozenset()

    def covers(self, waiting: Waiting) -> bool:
        """Return True if a job is paused: by its queue, task or tenant, or with the whole platform."""
        return not self.scopes.isdisjoint(scopes_of(waiting.request.queue, waiting.task, tenant_of(waiting.shape)))

    def hold_back(self, filed: str) -> bool:
        """Return True if the jobs that are filed under a shape are paused."""
        task = unquote(split_shape(filed).task)
        return not self.scopes.isdisjoint(scopes_of(Request.from_shape(filed).queue, task, tenant_of(filed)))

    def admissible(self, backlog: Iterable[Waiting]) -> Iterator[Waiting]:
        """Yield the jobs that are not paused."""
        return (waiting for waiting in backlog if not self.covers(waiting))


def scopes_of(queue: str, task: str, tenant: str) -> tuple[Scope, ...]:
    """Return the scopes that a job is in, the widest first. `task`: "" for none that can be paused."""
    named = (Scope(Kind.TASK, task),) if task else ()
    return (Scope(Kind.PLATFORM), Scope(Kind.QUEUE, queue), *named, Scope(Kind.TENANT, tenant))
