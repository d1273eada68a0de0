"""Make the cordons and pauses in the ledger equal Postgres.

An operator's action is durable in Postgres first. Then the same program copies it, by `level`, and the scripts obey it
from that moment. A program that dies in between leaves a ledger of an older version: the runner of the duties looks for
that each second, and copies too. A new epoch is opened with the controls in it (`Ledger.open_epoch`). Only one program
copies at a time, since it holds the lock of all changes meanwhile. One that lost the lock without knowing is refused by
its version.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Final

from sqlalchemy import Connection, Engine

from celery_capacity.routing.database import tenants
from celery_capacity.routing.ledger import keys, snapshot
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.model.request import task_text
from celery_capacity.routing.policy.pauses import Kind, Scope
from celery_capacity.routing.recovery import workers_with_room
from celery_capacity.routing.recovery.drift import Reconciled
from celery_capacity.routing.store import controls
from celery_capacity.routing.store.controls import Controls

#: Changes that one script makes: well under a millisecond of the server.
CHUNK: Final = 50


def entries(current: Controls) -> dict[tuple[str, str], str]:
    """Return the controls as the ledger has them.

    These are (cordon, worker) -> status, (pause, field) -> 1, and (tenant, name) -> rule.
    """
    rules = {("tenant", tenant): rule.text for tenant, rule in current.rules.items()}
    cordons = {("cordon", worker): cordon.status for worker, cordon in current.cordons.items()}
    return {**rules, **cordons, **{("pause", field_of(pause.scope)): "1" for pause in current.pauses}}


def field_of(scope: Scope) -> str:
    """Return the field of `ledger:paused` for a scope. A task is named as in the shapes of its jobs."""
    if scope.kind is Kind.PLATFORM:
        return scope.kind.value
    return f"{scope.kind.value}:{task_text(scope.name) if scope.kind is Kind.TASK else scope.name}"


def is_level(engine: Engine, ledger: Ledger) -> bool:
    """Return True if the ledger has the newest action of an operator."""
    with engine.connect() as connection:
        newest = controls.version(connection)
    return ledger.controls_version() == newest


def level(engine: Engine, ledger: Ledger) -> int:
    """Copy what differs to the ledger, and fill room that this opens; return the number of differences.

    Raises `LedgerClosed` where the ledger is cold or of another epoch than the caller's.
    """
    with _locked(engine) as connection:
        current = controls.read(connection)
        wanted, existing = entries(current), ledger.controls()
        changes = {key: value for key, value in wanted.items() if existing.get(key) != value}
        removed = [key for key in existing if key not in wanted]
        rows = [*changes.items(), *((key, "") for key in removed)]
        for start in range(0, len(rows), CHUNK):
            if not ledger.set_controls(current.version, dict(rows[start : start + CHUNK]), last=False):
                return 0
        # The ledger has the version once the shapes are let go: the next program lets them go where this one dies.
        is_old = ledger.controls_version() != current.version
        resumed = ledger.resume_shapes() if removed or is_old else 0
        if not ledger.set_controls(current.version, {}, last=True):
            return 0
    if any(kind == "tenant" for kind, _ in changes):
        # Jobs that run already count against a quota. Where this program dies before, the next reconcile counts them.
        count_held(ledger)
    # Another rule of a tenant may let jobs start.
    if removed or resumed or any(kind == "tenant" for kind, _ in changes):
        workers_with_room.fill_all(ledger)
    if any(kind == "pause" for kind, _ in changes):
        # A worker that is kept for a paused job is free for others.
        for worker in ledger.kept_workers():
            ledger.fill(worker)
    return len(rows)


def count_held(ledger: Ledger, workers: Collection[str] = ()) -> None:
    """Count what ran before tenants were in use, on all workers with a lease and on these, while tenants are in use."""
    if ledger.has_tenants():
        leased = map(snapshot.text, ledger.client.zrange(keys.LEASES, 0, -1))
        ledger.count_held(sorted({*workers, *leased}))


def refresh_shares(engine: Engine, ledger: Ledger) -> None:
    """Let the past use of tenants decay, and tell the ledger the capacity of all workers, while tenants are in use."""
    if ledger.has_tenants():
        with engine.connect() as connection:
            totals = tenants.capacity(connection)
        ledger.age_shares(totals)


@contextmanager
def _locked(engine: Engine) -> Iterator[Connection]:
    """Open a transaction in which nobody else changes controls, or copies them."""
    with engine.execution_options(isolation_level="READ COMMITTED").begin() as connection:
        controls.lock(connection)
        yield connection


def restore(engine: Engine, ledger: Ledger, result: Reconciled) -> None:
    """Copy what differs though the ledger has the newest version, and let shapes go that no pause holds back."""
    is_drift = is_level(engine, ledger)
    copied = level(engine, ledger)
    for _ in range(copied if is_drift else 0):
        result.note("a cordon or a pause that only one store has")
    with _locked(engine):
        resumed = ledger.resume_shapes()
    if resumed:
        result.note("a shape held back without a pause")
        workers_with_room.fill_all(ledger)
