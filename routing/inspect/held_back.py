"""Orders of operators, for people: the cordons and pauses of an overview, and where the two stores differ in them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import redis as redispy
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from celery_capacity.routing.insert import key_lines
from celery_capacity.routing.ledger import keys, snapshot
from celery_capacity.routing.model.reasons import Reason
from celery_capacity.routing.model.request import alternatives_of, run_time_of, split_shape, terms_of
from celery_capacity.routing.model.states import WorkerStatus
from celery_capacity.routing.policy.feasibility import survey
from celery_capacity.routing.policy.placement import Admission, Book, Refusal
from celery_capacity.routing.recovery.controls import entries
from celery_capacity.routing.store import controls
from celery_capacity.routing.store.controls import Cordon, Orders

_Overview = TypeVar("_Overview", bound=Any)

#: Reasons of the policy that a cordon may be behind.
BY_CORDON = frozenset(
    {Reason.NO_WORKER, Reason.NO_ROOM, Reason.TOO_LARGE, Reason.ALONE, Reason.NO_TIME, Reason.NO_LABEL}
)


def added(seen: _Overview, engine: Engine) -> _Overview:
    """Return an overview with the cordons, the pauses and the keys that jobs wait for, which Postgres has.

    Where Postgres does not answer, return it as it is, since the values of the ledger need not wait.
    """
    try:
        with engine.connect() as connection:
            cordons, pauses = controls.cordons(connection), controls.pauses(connection)
            waited_for = key_lines.waited_for(connection)
    except (DBAPIError, PoolTimeout):
        return seen
    orders, lines = Orders(pauses, tuple(cordons.values())), tuple(_with_cordon(line, cordons) for line in seen.workers)
    return replace(seen, workers=lines, orders=orders, keys=waited_for)


def _with_cordon(line: Any, cordons: Mapping[str, Cordon]) -> Any:
    """Return the line of a worker with its cordon. A worker that stops by itself stays `draining`."""
    cordon = cordons.get(line.name)
    if cordon is None:
        return line
    return replace(line, cordon=cordon, status=cordon.status if line.status == WorkerStatus.READY else line.status)


def cordon_in_the_way(
    connection: Connection, filed: str, books: Iterable[Book], refusal: Refusal | None
) -> Cordon | None:
    """Return the cordon of a worker that would take a job now, while no other worker takes it; None for none."""
    if refusal is None or refusal.reason not in BY_CORDON:
        return None
    cordons = controls.cordons(connection)
    opened = [replace(book, admitting=True) for book in books if book.worker in cordons]
    task, bound, terms = split_shape(filed).task, run_time_of(filed).bound, terms_of(filed)
    for request in alternatives_of(filed) if opened else ():
        decision = survey(request, opened, 0, task, bound, terms)
        if isinstance(decision, Admission):
            return cordons[decision.worker]
    return None


def differences(connection: Connection, client: redispy.Redis) -> Iterator[str]:
    """Describe each cordon or pause that only one store has, and each shape that is held back without a pause."""
    head = snapshot.read_head(client)
    if head.epoch is None:
        return
    pipe = client.pipeline(transaction=True)
    pipe.hgetall(keys.CORDONS)
    pipe.hgetall(keys.PAUSED)
    pipe.hgetall(keys.TENANTS)
    cordons, pauses, rules = pipe.execute()
    stored = entries(controls.read(connection))
    copied = {**_entries("cordon", cordons), **_entries("pause", pauses), **_entries("tenant", rules)}
    for kind, name in sorted(stored.keys() | copied.keys()):
        ours, theirs = copied.get((kind, name)), stored.get((kind, name))
        if ours != theirs:
            yield f"{kind} of {name} is {ours or 'nothing'} in Redis, {theirs or 'nothing'} in Postgres"
    if not pauses:
        yield from (f"shape {shape} is held back without a pause" for shape in sorted(head.withheld))
    books = snapshot.read_books(client, head.leases)
    for name, book in sorted(books.items()):
        if book.cordoned != copied.get(("cordon", name), "") and head.is_live(book):
            yield f"the book of worker {name} says {book.cordoned or 'no cordon'}"


def _entries(kind: str, fields: Mapping[Any, Any]) -> dict[tuple[str, str], str]:
    return {(kind, snapshot.text(name)): snapshot.text(value) for name, value in fields.items()}
