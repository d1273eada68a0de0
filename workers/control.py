"""Celery's remote control, with a revoke that reaches jobs which no worker holds."""

from __future__ import annotations

from typing import Any

from celery.app.control import Control
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from routing import roster, store, stream
from routing.errors import StoreUnavailable
from routing.names import check_job_id
from routing.postgres import translate
from routing.replies import Cancelled, LedgerClosed
from routing.states import State
from workers.stores import Stores
from workers.undelivered import deliver_rows

#: The text of the error, and of the exception that the result carries, as Celery has it.
REVOKED = "revoked"


class PlatformControl:
    """Mixed into the app's control class."""

    stores: Stores

    def revoke(
        self,
        task_id: Any,
        destination: Any = None,
        terminate: bool = False,
        signal: str = "SIGTERM",
        **kwargs: Any,
    ) -> Any:
        """Revoke jobs. One that waits or is scheduled ends at once, for good, with the result REVOKED; of one that a
        worker holds the worker is told, as Celery does (`terminate` ends its process)."""
        ids = [check_job_id(one) for one in ([task_id] if isinstance(task_id, str) else task_id)]
        ended = [job for job in ids if end_before_start(self.stores, job, State.CANCELLED, REVOKED)]
        if ended:
            # (What the backend does not take now, a worker's duty brings.)
            deliver_rows(self.app, self.stores, ended)  # type: ignore[attr-defined]
        return super().revoke(task_id, destination=destination, terminate=terminate, signal=signal, **kwargs)  # type: ignore[misc]


def end_before_start(stores: Stores, job: str, state: State, error: str) -> bool:
    """End a job that no worker holds, as cancelled or expired. False where a worker holds it, or it has ended."""
    try:
        with stores.engine.connect() as connection:
            known = roster.read_authority(connection)
            if known.authority == "postgres":
                return store.end_unfiled(connection, job, state, error)
            stores.ledger.epoch = known.epoch
            cancelled = _cancel(stores, connection, job, state, error)
            if cancelled.entry is not None:
                # Perhaps no worker lives that would write it.
                stream.apply_entry(stores.engine, stores.ledger, cancelled.entry)
                return True
            ended = cancelled.verdict == "missing" and store.end_unfiled(connection, job, state, error)
            if ended:
                stores.sending.ask(lambda ledger: ledger.announce(job))
            return ended
    except DBAPIError as problem:
        raise translate(problem, f"job {job} was not ended: ") from problem
    except PoolTimeout as problem:
        raise StoreUnavailable(f"job {job} was not ended: no connection to Postgres was free") from problem


def _cancel(stores: Stores, connection: Any, job: str, state: State, error: str) -> Cancelled:
    """Cancel in the ledger. Without one Postgres alone decides: what it says is accepted is on its way nowhere."""
    try:
        return stores.ledger.cancel(job, state.value, error)
    except LedgerClosed:
        stores.ledger.epoch = store_epoch(connection)
    except StoreUnavailable:
        return Cancelled("missing")
    try:
        return stores.ledger.cancel(job, state.value, error)
    except (LedgerClosed, StoreUnavailable):
        return Cancelled("missing")


def store_epoch(connection: Any) -> int:
    return roster.read_authority(connection).epoch


def control_class(base: type = Control, stores: Stores | None = None) -> type:
    """The app's control class with the platform's in front of it."""
    return type("Control", (PlatformControl, base), {"stores": stores})
