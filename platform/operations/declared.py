"""Requests that workers have declared for tasks, for a program that does not import them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from celery_capacity.routing.config.task_rules import RERUN
from celery_capacity.routing.model.amounts import CPUS, GPUS, MEMORY, is_named
from celery_capacity.routing.model.request import Request
from celery_capacity.routing.store import queries
from celery_capacity.routing.store.worker_rows import declarations

if TYPE_CHECKING:
    from celery import Celery

    from celery_capacity.workers.process.stores import Stores


@dataclass(frozen=True, slots=True)
class Declared:
    """Declared requests by task, as options of a submission. `unknown`: tasks that no worker has declared, sorted.

    `names`: all declared tasks, where some are unknown.
    """

    options: dict[str, dict[str, Any]]
    unknown: tuple[str, ...] = ()
    names: tuple[str, ...] = ()

    def of(self, task: str) -> dict[str, Any]:
        """Return the options of a task; none where the app or the ledger can tell them."""
        return self.options.get(task, {})


def read_declared(app: Celery, stores: Stores, tasks: Collection[str]) -> Declared:
    """Return the requests that Postgres has for tasks, where nobody else can tell them.

    The app knows its own tasks, and asks the ledger for others.
    """
    others = sorted(set(tasks).difference(app.tasks))
    if not others:
        return Declared({})
    with stores.engine.connect() as connection:
        if not queries.may_read(connection, "declarations"):
            return Declared({})
        declared = declarations(connection)
    unknown = tuple(task for task in others if task not in declared)
    names = tuple(declared) if unknown else ()
    if len(unknown) == len(others) or stores.sending.ask(lambda ledger: ledger.client.ping()):
        return Declared({}, unknown, names)
    return Declared({task: _options(declared[task]) for task in others if task in declared}, unknown, names)


def _options(declared: dict[str, Any]) -> dict[str, Any]:
    request = Request.from_people({name: value for name, value in declared.items() if name != RERUN})
    options: dict[str, Any] = {}
    for name, value in request.to_people().items():
        if name in (CPUS, MEMORY, GPUS):
            options[name] = value
        elif is_named(name):
            options.setdefault("resources", {})[name] = value
    return options
