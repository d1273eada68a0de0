"""The forms by which operators act: title and text, the targets in the path, the fields, and the action itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import click
from starlette.datastructures import QueryParams

from celery_capacity.platform.console.durations import Duration
from celery_capacity.platform.console.job_ids import whole_ids
from celery_capacity.platform.operations import controls, jobs
from celery_capacity.platform.web.api.action_models import MAX_MANY
from celery_capacity.platform.web.api.filters import filter_of_query
from celery_capacity.platform.web.http.problems import wrong_parameter
from celery_capacity.platform.web.sources import Sources
from celery_capacity.routing.database.audit import Actor
from celery_capacity.routing.errors import InvalidRequest
from celery_capacity.routing.model.states import FINAL, State
from celery_capacity.routing.policy.pauses import Scope
from celery_capacity.routing.store.controls import MAX_REASON, target_of

#: Values of the filter of jobs that choose jobs.
CONDITIONS: Final = ("state", "task", "queue", "worker", "group", "text", "since", "until")
PLATFORM: Final = Scope.of()
#: States that a retry of many takes where the filter names none.
UNSUCCESSFUL: Final = (State.FAILED, State.LOST)


class Kind(StrEnum):
    """Kind of the targets of a form, which stand in the query of its path."""

    JOB = "job"
    JOBS = "jobs"
    WORKER = "worker"
    PART = "part"
    MESSAGES = "messages"
    PLATFORM = "platform"


@dataclass(frozen=True, slots=True)
class Order:
    """An action as a person orders it: its targets, and the values of the form. `conditions`: that chose the jobs."""

    targets: tuple[str, ...]
    scope: Scope = PLATFORM
    conditions: Mapping[str, str] | None = None
    reason: str | None = None
    deadline: float | None = None
    priority: int = 0
    terminate: bool = False
    again: bool = False

    @property
    def ids(self) -> list[int]:
        """Return the numbers of the messages."""
        return list(map(int, self.targets))


@dataclass(frozen=True, slots=True)
class Form:
    """A form. `title`: also the words of its button; `text`: what it does. `alarm`: it ends work or deletes."""

    title: str
    text: str
    kind: Kind
    run: Callable[[Sources, Actor, Order], object]
    fields: tuple[str, ...] = ()
    alarm: bool = False


def _cancel(sources: Sources, actor: Actor, order: Order) -> None:
    app, stores = sources.acting()
    chosen = order.conditions or {}
    list(jobs.cancel(app, stores, actor, order.targets, terminate=order.terminate, chosen=chosen))


def _retry(sources: Sources, actor: Actor, order: Order) -> None:
    """Retry jobs. Raises the refusal of a job that is retried alone."""
    app, stores = sources.acting()
    chosen = order.conditions or {}
    results = list(jobs.retry_all(app, stores, actor, order.targets, again=order.again, chosen=chosen))
    if order.conditions is None and results[0].refused is not None:
        raise results[0].refused


def _priority(sources: Sources, actor: Actor, order: Order) -> None:
    jobs.set_priority(sources.acting()[1], actor, order.targets, order.priority, reason=order.reason)


def _cordon(sources: Sources, actor: Actor, order: Order) -> None:
    controls.cordon(sources.acting()[1], actor, order.targets, reason=order.reason)


def _uncordon(sources: Sources, actor: Actor, order: Order) -> None:
    controls.uncordon(sources.acting()[1], actor, order.targets)


def _drain(sources: Sources, actor: Actor, order: Order) -> None:
    stores = sources.acting()[1]
    controls.drain(stores, actor, order.targets, reason=order.reason, deadline=order.deadline)


def _shutdown(sources: Sources, actor: Actor, order: Order) -> None:
    stores = sources.acting()[1]
    controls.drain(stores, actor, order.targets, reason=order.reason, deadline=order.deadline, stops=True)


def _pause(sources: Sources, actor: Actor, order: Order) -> None:
    controls.pause(sources.acting()[1], actor, order.scope, reason=order.reason)


def _resume(sources: Sources, actor: Actor, order: Order) -> None:
    controls.resume(sources.acting()[1], actor, order.scope)


def _reconcile(sources: Sources, actor: Actor, _: Order) -> None:
    controls.reconcile_stores(sources.acting()[1], actor)


def _drop(sources: Sources, actor: Actor, order: Order) -> None:
    controls.drop_quarantined(sources.acting()[1], actor, order.ids)


def _requeue(sources: Sources, actor: Actor, order: Order) -> None:
    """Put messages back. Raises the refusal of a message that is put back alone."""
    app, stores = sources.acting()
    results = controls.requeue_quarantined(app, stores, actor, order.ids)
    if len(results) == 1 and not results[0].done:
        detail = results[0].detail or "there is no such message"
        raise InvalidRequest(f"message {results[0].message} was not put back: {detail}", value=results[0].message)


#: The forms, by the last part of their paths.
FORMS: Final = {
    "cancel": Form(
        "Cancel the job",
        "It ends for good. A running job goes on to its end, unless its process is ended too.",
        Kind.JOB,
        _cancel,
        ("terminate",),
        alarm=True,
    ),
    "retry": Form("Retry the job", "A new job has the same message and request.", Kind.JOB, _retry, ("again",)),
    "priority": Form(
        "Change the priority",
        "9 comes first. A waiting job has its new place at once, a running job at its next attempt.",
        Kind.JOB,
        _priority,
        ("priority", "reason"),
    ),
    "cancel-all": Form(
        "Cancel these jobs",
        "They end for good. Running jobs go on to their ends, unless their processes are ended too.",
        Kind.JOBS,
        _cancel,
        ("terminate",),
        alarm=True,
    ),
    "retry-all": Form("Retry these jobs", "Each becomes a new job with its message and request.", Kind.JOBS, _retry),
    "cordon": Form(
        "Cordon", "Nothing more is admitted to the worker. What runs there goes on.", Kind.WORKER, _cordon, ("reason",)
    ),
    "uncordon": Form("Uncordon", "The worker gets jobs again. This ends a drain too.", Kind.WORKER, _uncordon),
    "drain": Form(
        "Drain",
        "Nothing more is admitted to the worker, and it becomes empty.",
        Kind.WORKER,
        _drain,
        ("deadline", "reason"),
        alarm=True,
    ),
    "shutdown": Form(
        "Shut down",
        "The worker becomes empty, and then its process ends.",
        Kind.WORKER,
        _shutdown,
        ("deadline", "reason"),
        alarm=True,
    ),
    "pause": Form(
        "Pause", "Nothing more of this starts. Submissions are accepted, and wait.", Kind.PART, _pause, ("reason",)
    ),
    "resume": Form("Resume", "This starts again.", Kind.PART, _resume),
    "reconcile": Form(
        "Reconcile", "The ledger is compared with Postgres, and made equal to it.", Kind.PLATFORM, _reconcile
    ),
    "requeue": Form(
        "Put the messages back",
        "Each goes into its queue again. A worker that still cannot read it sets it aside once more.",
        Kind.MESSAGES,
        _requeue,
    ),
    "drop": Form("Drop the messages", "They are deleted, with their bytes.", Kind.MESSAGES, _drop, alarm=True),
}


def order_of(sources: Sources, name: str, query: QueryParams) -> Order:
    """Return the order of a form that is not filled in. `query`: of its path, with the targets.

    Raises `InvalidRequest` and `UnknownJob` for wrong ones.
    """
    form = FORMS[name]
    conditions = None
    scope = PLATFORM
    targets: tuple[str, ...] = ("platform",)
    if form.kind is Kind.JOB:
        targets = tuple(whole_ids(sources.stores.engine, [query.get("job", "")], exact=True))
    elif form.kind is Kind.JOBS:
        conditions = {key: ", ".join(query.getlist(key)) for key in CONDITIONS if query.get(key)}
        targets = _matching(sources, name, query, conditions)
    elif form.kind is Kind.WORKER:
        targets = (query.get("worker", ""),)
    elif form.kind is Kind.PART:
        scope = Scope.of(*(query.get(key) for key in ("queue", "task", "tenant")))
        targets = (target_of(scope),)
    elif form.kind is Kind.MESSAGES:
        targets = _messages(query.getlist("id"))
    return Order(targets, scope, conditions)


def fill_in(order: Order, values: Mapping[str, str]) -> Order:
    """Return the order with the values of its fields. Raises `InvalidRequest` for a wrong one."""
    return dataclasses.replace(
        order,
        reason=_reason(values.get("reason", "")),
        deadline=_deadline(values.get("deadline", "")),
        priority=_digit(values.get("priority", "")),
        terminate="terminate" in values,
        again="again" in values,
    )


def _matching(sources: Sources, name: str, query: QueryParams, conditions: Mapping[str, str]) -> tuple[str, ...]:
    if not conditions:
        raise wrong_parameter("state", "", "Choose jobs by a filter of the page Jobs first.")
    wanted = filter_of_query(query)
    active = [state for state in wanted.states if state not in FINAL]
    ended = [state for state in wanted.states if state in FINAL and state is not State.SUCCEEDED]
    if name == "retry-all" and not query.get("state"):
        ended = [*UNSUCCESSFUL]
    states = active if name == "cancel-all" else ended
    if not states:
        raise wrong_parameter("state", conditions.get("state"), "No job in this state can be chosen for that.")
    chosen = dataclasses.replace(wanted, states=tuple(states))
    return tuple(sources.ids(chosen, MAX_MANY + 1, retried=name == "cancel-all"))


def _messages(ids: list[str]) -> tuple[str, ...]:
    for message in ids:
        if not (message.isascii() and message.isdigit() and len(message) <= 18):
            raise wrong_parameter("id", message, "Choose messages on the page of the quarantine.")
    if not 1 <= len(ids) <= MAX_MANY:
        raise wrong_parameter("id", len(ids), "Choose messages on the page of the quarantine.")
    return tuple(dict.fromkeys(ids))


def _reason(text: str) -> str | None:
    if len(text) > MAX_REASON:
        raise wrong_parameter("reason", text, f"Write at most {MAX_REASON} characters.")
    return text or None


def _deadline(text: str) -> float | None:
    if not text.strip():
        return None
    try:
        return float(Duration().convert(text, None, None))
    except click.UsageError:
        raise wrong_parameter("deadline", text, Duration.advice) from None


def _digit(text: str) -> int:
    if len(text) > 1 or not (text or "0").isdigit() or not text.isascii():
        raise wrong_parameter("priority", text, "Write a number from 0 to 9.")
    return int(text or "0")
