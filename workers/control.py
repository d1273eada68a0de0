"""Celery's remote control, with a revoke that reaches jobs which no worker holds."""

from __future__ import annotations

from typing import Any

from celery.app.control import Control
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from routing import gates, roster, store, stream
from routing.accept import Rate
from routing.errors import InvalidRequest, StoreUnavailable, show
from routing.gates import Opened
from routing.names import check_job_id
from routing.postgres import translate
from routing.replies import Cancelled, LedgerClosed
from routing.states import State
from workers.gates import rate_of
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
            open_gates(self.app, self.stores)  # type: ignore[attr-defined]
        return super().revoke(task_id, destination=destination, terminate=terminate, signal=signal, **kwargs)  # type: ignore[misc]

    def broadcast(self, command: Any, arguments: Any = None, destination: Any = None, *more: Any, **kwargs: Any) -> Any:
        """As Celery's; a rate limit (`rate_limit`, or `celery control rate_limit`) holds for the whole cluster from
        then on, until another one is set: 0 lifts it."""
        if command == "rate_limit":
            self._set_rate(dict(arguments or {}), destination)
        return super().broadcast(command, arguments, destination, *more, **kwargs)  # type: ignore[misc]

    def _set_rate(self, arguments: dict[str, Any], destination: Any) -> None:
        name, value = arguments.get("task_name"), arguments.get("rate_limit")
        if not isinstance(name, str) or not name:
            raise InvalidRequest(f"task name {show(name)} is not valid", value=name, advice="It must be text.")
        if destination is not None:
            advice = "Leave destination out."
            raise InvalidRequest("a rate limit holds for the whole cluster", value=destination, advice=advice)
        rate = rate_of(value, "rate_limit") or Rate(0.0, "0")
        try:
            with self.stores.engine.connect() as connection:
                gates.set_rate(connection, name, rate, by_control=True)
        except DBAPIError as problem:
            raise translate(problem, f"the rate limit of {name} was not set: ") from problem
        except PoolTimeout as problem:
            raise StoreUnavailable(f"the rate limit of {name} was not set: no connection was free") from problem
        self.app.amqp.job_sender.rates.forget()  # type: ignore[attr-defined]


def open_gates(app: Any, stores: Stores) -> Opened:
    """Bring in what waited for jobs that have ended; who cannot start any more hears of it."""
    opened = gates.open_needs(stores.engine)
    if opened.cancelled:
        deliver_rows(app, stores, opened.cancelled)
    return opened


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
            return cancelled.verdict == "missing" and store.end_unfiled(connection, job, state, error)
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
