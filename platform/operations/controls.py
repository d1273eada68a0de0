"""Actions on workers, on parts of the backlog, and on the books: cordon, drain, pause, reconcile, and their likes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from celery_capacity.platform.operations.auditing import audited
from celery_capacity.routing.database import deadlines
from celery_capacity.routing.database.audit import Actor, Outcome
from celery_capacity.routing.database.postgres_errors import translated
from celery_capacity.routing.inspect.audit import Progress
from celery_capacity.routing.policy.pauses import Scope
from celery_capacity.routing.recovery import rebuild, reconcile
from celery_capacity.routing.recovery.drift import Reconciled, jobs_to_compare
from celery_capacity.routing.recovery.rebuild import Rebuilt
from celery_capacity.routing.store import quarantine
from celery_capacity.routing.store.controls import target_of
from celery_capacity.workers.client import controls, requeue
from celery_capacity.workers.client.controls import PauseOrder, WorkerOrder
from celery_capacity.workers.client.requeue import Requeued

if TYPE_CHECKING:
    from celery import Celery

    from celery_capacity.workers.process.stores import Stores


def cordon(stores: Stores, actor: Actor, workers: Sequence[str], *, reason: str | None = None) -> list[WorkerOrder]:
    """Admit nothing more to these workers, as `workers.client.controls`."""
    with audited(stores, actor, "cordon", workers, {"reason": reason}):
        return controls.cordon(stores, workers, reason=reason, by=actor.name)


def drain(
    stores: Stores,
    actor: Actor,
    workers: Sequence[str],
    *,
    reason: str | None = None,
    deadline: float | None = None,
    stops: bool = False,
) -> list[WorkerOrder]:
    """Let these workers become empty. `deadline`: seconds until their jobs are handed back. `stops`: then end them."""
    action, details = "shutdown" if stops else "drain", {"reason": reason, "deadline_seconds": deadline}
    with audited(stores, actor, action, workers, details):
        return controls.cordon(
            stores, workers, reason=reason, by=actor.name, drains=True, deadline=deadline, stops=stops
        )


def uncordon(stores: Stores, actor: Actor, workers: Sequence[str]) -> list[WorkerOrder]:
    """Admit jobs to these workers again, as `workers.client.controls`."""
    with audited(stores, actor, "uncordon", workers):
        return controls.uncordon(stores, workers, by=actor.name)


def pause(stores: Stores, actor: Actor, scope: Scope, *, reason: str | None = None) -> PauseOrder:
    """Start nothing more of a part of the backlog, as `workers.client.controls`."""
    with audited(stores, actor, "pause", [target_of(scope)], {"reason": reason}):
        return controls.pause(stores, scope, reason=reason, by=actor.name)


def resume(stores: Stores, actor: Actor, scope: Scope) -> PauseOrder:
    """Start a part of the backlog again. The outcome is a refusal where it was not paused."""
    with audited(stores, actor, "resume", [target_of(scope)]) as note:
        order = controls.resume(stores, scope, by=actor.name)
        note.outcome = Outcome.DONE if order.before else Outcome.REFUSED
        return order


def reconcile_stores(
    stores: Stores, actor: Actor, progress: Progress | None = None
) -> tuple[Reconciled, Rebuilt | None]:
    """Make the ledger equal Postgres; open it first where it is cold. Return what differed, and what was opened.

    `progress`: called with the number of compared jobs, of how many, after each chunk of them.
    """
    with audited(stores, actor, "reconcile", ["platform"]) as note:
        with deadlines.patiently(stores.settings.store_timeout * deadlines.LONG):
            rebuilt = rebuild.open_if_cold(stores.engine, stores.ledger)
            observer = None if progress is None else _of_how_many(progress, _jobs_to_compare(stores))
            done = reconcile.reconcile(stores.engine, stores.ledger, observer)
        note.outcome = Outcome.DONE if done.all_repaired else Outcome.PARTLY
        note.details |= done.counts()
        return done, rebuilt


def _of_how_many(progress: Progress, total: int) -> Callable[[int], object]:
    return lambda done: progress(done, total)


def _jobs_to_compare(stores: Stores) -> int:
    with translated("nothing was compared: "), stores.engine.connect() as connection:
        return jobs_to_compare(connection)


def drop_quarantined(stores: Stores, actor: Actor, ids: Sequence[int]) -> int:
    """Delete messages that were set aside, by their ids; return the number of those that were there."""
    with audited(stores, actor, "drop", [str(message) for message in ids]) as note:
        with translated("no message was dropped: "), stores.engine.connect() as connection:
            dropped = quarantine.drop(connection, ids)
        note.count(["dropped"] * dropped + ["unknown"] * (len(ids) - dropped), len(ids) - dropped)
        return dropped


def requeue_quarantined(app: Celery, stores: Stores, actor: Actor, ids: Sequence[int]) -> list[Requeued]:
    """Put messages that were set aside back where they came from, as `workers.client.requeue`."""
    with audited(stores, actor, "requeue", [str(message) for message in ids]) as note:
        results: list[Requeued] = []
        try:
            results.extend(requeue.requeue(app, stores, ids))
        finally:
            # Also where a store went away between two messages: `extend` keeps those before the error.
            note.count([result.became.value for result in results], sum(not result.done for result in results))
            if reasons := [f"{result.message}: {result.detail}" for result in results if result.detail]:
                note.details["why"] = "; ".join(reasons)
        return results
