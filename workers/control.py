"""Celery's remote control, with a revoke that reaches jobs which no worker holds, and outlives the worker of others."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Any, Final

from celery.app.control import Control
from kombu.exceptions import OperationalError
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from celery_capacity.routing.database.authority import read_authority
from celery_capacity.routing.database.postgres import is_locked, translate
from celery_capacity.routing.errors import InvalidRequest, StoreUnavailable, show
from celery_capacity.routing.ledger.replies import Cancelled, LedgerClosed
from celery_capacity.routing.model.identifiers import check_job_id
from celery_capacity.routing.model.job import Rate
from celery_capacity.routing.model.states import State
from celery_capacity.routing.recovery import revocation, transition_log
from celery_capacity.routing.store import dependencies, job_transitions
from celery_capacity.routing.store.dependencies import Opened
from celery_capacity.routing.store.job_transitions import REVOKED
from celery_capacity.workers.gates import rate_of
from celery_capacity.workers.stores import Stores
from celery_capacity.workers.undelivered import deliver_rows

logger = logging.getLogger(__name__)

#: The error of a job that `celery purge` ended.
PURGED: Final = "purged"
#: What a broadcast of these carries, where the rows have been seen to already (see `workers.panel`).
TOLD: Final = "told"
_COMMANDS: Final = ("revoke", "revoke_by_stamped_headers")

#: Set while this process broadcasts a revoke of which the rows know.
_told: ContextVar[bool] = ContextVar("celery-capacity told", default=False)


class PlatformControl:
    """Mixed into the app's control class."""

    stores: Stores
    app: Any

    def revoke(
        self,
        task_id: Any,
        destination: Any = None,
        terminate: bool = False,
        signal: str = "SIGTERM",
        **kwargs: Any,
    ) -> Any:
        """Revoke jobs (an id, or several). One that waits or is scheduled ends at once, for good, with the result
        REVOKED; of one that a worker holds the worker is told, as Celery does (`terminate` ends its process), and its
        row keeps it: the job runs no other attempt. While the ledger does not answer every job is only marked, starts
        no more, and ends within the sweep's interval once it answers. Raises `InvalidRequest`, and `StoreUnavailable`:
        also where `terminate` is asked for and the broker is away, so that no worker can be told."""
        ids = [check_job_id(one) for one in ([task_id] if isinstance(task_id, str) else task_id)]
        revoke_jobs(self.app, self.stores, ids)
        with _telling(terminate):
            return super().revoke(task_id, destination=destination, terminate=terminate, signal=signal, **kwargs)  # type: ignore[misc]

    def revoke_by_stamped_headers(
        self, headers: Any, destination: Any = None, terminate: bool = False, signal: str = "SIGTERM", **kwargs: Any
    ) -> Any:
        """The same for all jobs that carry one of these stamps: {name: value or list of values}. Workers remember the
        stamps, as Celery's do: what is submitted with one later ends when it is to start."""
        revoke_stamped(self.app, self.stores, headers)
        with _telling(terminate):
            return super().revoke_by_stamped_headers(  # type: ignore[misc]
                headers, destination=destination, terminate=terminate, signal=signal, **kwargs
            )

    def purge(self, connection: Any = None) -> int:
        """Empty the queues: what waits in their backlogs ends as cancelled, and messages of old producers that are not
        enrolled yet are dropped. Returns how many."""
        if getattr(connection, "purge_jobs", None) is not None:
            return int(super().purge(connection))  # type: ignore[misc]
        # (Those of a pool are kombu's own, which know of no jobs.)
        with self.app.connection_for_write() as own:
            return int(super().purge(own))  # type: ignore[misc]

    discard_all = purge

    def broadcast(
        self, command: Any, arguments: Any = None, destination: Any = None, *more: Any, **options: Any
    ) -> Any:
        """As Celery's; a rate limit (`rate_limit`, or `celery control rate_limit`) holds for the whole cluster from
        then on, until another one is set: 0 lifts it."""
        if command in _COMMANDS and _told.get():
            arguments = {**(arguments or {}), TOLD: True}
        if command == "rate_limit":
            self._set_rate(dict(arguments or {}), destination)
        return super().broadcast(command, arguments, destination, *more, **options)  # type: ignore[misc]

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
                dependencies.set_rate(connection, name, rate, by_control=True)
        except DBAPIError as problem:
            raise translate(problem, f"the rate limit of {name} was not set: ") from problem
        except PoolTimeout as problem:
            raise StoreUnavailable(f"the rate limit of {name} was not set: no connection was free") from problem
        self.app.amqp.job_sender.rates.forget()


class _telling:  # noqa: N801 - reads as a statement
    """Within, what this thread broadcasts says that the rows know. While the broker is away they are enough, but for
    what is to be terminated."""

    def __init__(self, terminate: bool) -> None:
        self._terminate = terminate

    def __enter__(self) -> None:
        self._token = _told.set(True)

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> bool:
        _told.reset(self._token)
        if not isinstance(error, OperationalError):
            return False
        if self._terminate:
            raise StoreUnavailable("what runs was not terminated, the broker does not answer; no attempt follows it")
        logger.warning("revoked in Postgres; no worker was told, the broker does not answer: %s", error)
        return True


def revoke_jobs(app: Any, stores: Stores, ids: Sequence[str]) -> int:
    """Revoke jobs in the stores: what waits ends, what a worker holds is marked. Returns how many ended."""
    try:
        with stores.engine.connect() as connection:
            jobs = revocation.mark(connection, ids)
    except DBAPIError as problem:
        raise translate(problem, "nothing was revoked: ") from problem
    except PoolTimeout as problem:
        raise StoreUnavailable("nothing was revoked: no connection to Postgres was free") from problem
    ended = [job for job in jobs if carry_out(stores, job)]
    if ended:
        # (What the backend does not take now, a worker's duty brings.)
        deliver_rows(app, stores, ended)
        open_gates(app, stores)
    return len(ended)


def revoke_stamped(app: Any, stores: Stores, headers: Any) -> int:
    """The same for the jobs that carry stamps. Raises `InvalidRequest` where these are no stamps."""
    if not isinstance(headers, Mapping) or not all(isinstance(name, str) for name in headers):
        raise InvalidRequest(
            "stamped headers are a mapping of names to values", value=headers, advice="Pass {'name': ['value', ...]}."
        )
    try:
        with stores.engine.connect() as connection:
            jobs = revocation.stamped(connection, headers)
    except DBAPIError as problem:
        raise translate(problem, "nothing was revoked: ") from problem
    return revoke_jobs(app, stores, jobs)


def carry_out(stores: Stores, job: str) -> bool:
    """Go on with the revoke of a job whose row is marked: end it if it waits, and mark it in the ledger if a worker
    holds it. Whether it ended. What a store does not take now the sweep does."""
    for _ in range(revocation.TRIES):
        try:
            if end_before_start(stores, job, State.CANCELLED, REVOKED):
                return True
        except StoreUnavailable as error:
            if not is_locked(error):
                raise
            logger.warning("job %s was revoked, and its row is locked: it ends later", job)
            return False
        try:
            with stores.engine.connect() as connection:
                if read_authority(connection).authority == "postgres":
                    # The mark is all that it takes; and the ledger's server may be one that never answers.
                    return False
            if stores.ledger.revoke(job):
                return False
        except (LedgerClosed, StoreUnavailable):
            return False
        except DBAPIError as problem:
            raise translate(problem, f"job {job} was not revoked: ") from problem
        except PoolTimeout as problem:
            raise StoreUnavailable(f"job {job} was not revoked: no connection to Postgres was free") from problem
    return False


def purge_queue(app: Any, stores: Stores, queue: str) -> int:
    """End what waits in a queue's backlog, as cancelled; returns how many jobs. What is scheduled stays, as what a
    Celery worker holds until its time does."""
    purged = 0
    with stores.engine.connect() as connection:
        for jobs in revocation.waiting_in(connection, queue):
            ended = [job for job in jobs if end_before_start(stores, job, State.CANCELLED, PURGED)]
            deliver_rows(app, stores, ended)
            purged += len(ended)
    if purged:
        open_gates(app, stores)
    return purged


def open_gates(app: Any, stores: Stores) -> Opened:
    """Bring in what waited for jobs that have ended; who cannot start any more hears of it."""
    opened = dependencies.open_needs(stores.engine)
    if opened.cancelled:
        deliver_rows(app, stores, opened.cancelled)
        stores.sending.ask(lambda ledger: ledger.announce(opened.cancelled))
    return opened


def end_before_start(stores: Stores, job: str, state: State, error: str) -> bool:
    """End a job that no worker holds, as cancelled or expired. False where a worker holds it, it has ended, or the
    ledger does not say."""
    try:
        with stores.engine.connect() as connection:
            known = read_authority(connection)
            if known.authority == "postgres":
                return job_transitions.end_unfiled(connection, job, state, error)
            stores.ledger.epoch = known.epoch
            cancelled = _cancel(stores, connection, job, state, error)
            if cancelled.entry is not None:
                # Perhaps no worker lives that would write it.
                transition_log.apply_entry(stores.engine, stores.ledger, cancelled.entry)
                return True
            ended = cancelled.verdict == "missing" and job_transitions.end_unfiled(connection, job, state, error)
            if ended:
                stores.sending.ask(lambda ledger: ledger.announce([job]))
            return ended
    except DBAPIError as problem:
        raise translate(problem, f"job {job} was not ended: ") from problem
    except PoolTimeout as problem:
        raise StoreUnavailable(f"job {job} was not ended: no connection to Postgres was free") from problem


def _cancel(stores: Stores, connection: Any, job: str, state: State, error: str) -> Cancelled:
    """Cancel in the ledger. While it does not answer nobody can say where the job is: the ledger is ahead of its row,
    and a worker may run what is `accepted` there. So the job goes on being what it is, and a duty ends it later."""
    try:
        return stores.ledger.cancel(job, state.value, error)
    except LedgerClosed:
        stores.ledger.epoch = store_epoch(connection)
    except StoreUnavailable:
        return Cancelled("unsure")
    try:
        return stores.ledger.cancel(job, state.value, error)
    except (LedgerClosed, StoreUnavailable):
        return Cancelled("unsure")


def store_epoch(connection: Any) -> int:
    return read_authority(connection).epoch


def control_class(base: type = Control, stores: Stores | None = None) -> type:
    """The app's control class with the platform's in front of it."""
    return type("Control", (PlatformControl, base), {"stores": stores})
