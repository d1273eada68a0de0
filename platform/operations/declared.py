"""Tasks that no worker has declared, for a program that does not import them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from celery_capacity.routing.store import queries
from celery_capacity.routing.store.worker_rows import declarations

if TYPE_CHECKING:
    from celery import Celery

    from celery_capacity.workers.process.stores import Stores


@dataclass(frozen=True, slots=True)
class Undeclared:
    """Tasks that no worker has declared, sorted. `names`: all declared tasks, where some are unknown."""

    unknown: tuple[str, ...] = ()
    names: tuple[str, ...] = ()


def read_undeclared(app: Celery, stores: Stores, tasks: Collection[str]) -> Undeclared:
    """Return those of some tasks that neither the app nor a worker knows. None for a role that may not ask."""
    others = sorted(set(tasks).difference(app.tasks))
    if not others:
        return Undeclared()
    with stores.engine.connect() as connection:
        if not queries.may_read(connection, "declarations"):
            return Undeclared()
        declared = declarations(connection)
    unknown = tuple(task for task in others if task not in declared)
    return Undeclared(unknown, tuple(declared) if unknown else ())
