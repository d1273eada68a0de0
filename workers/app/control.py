"""Celery's remote control, with a revoke that also ends jobs which no worker holds, and that outlives any worker."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

from celery.app.control import Control
from kombu.exceptions import OperationalError

from celery_capacity.routing.database.postgres_errors import translated
from celery_capacity.routing.errors import InvalidRequest, StoreUnavailable, show
from celery_capacity.routing.model.identifiers import check_job_id
from celery_capacity.routing.model.job import Rate
from celery_capacity.routing.store import dependencies
from celery_capacity.workers.process.stores import Stores
from celery_capacity.workers.results.cancellation import TOLD, revoke_jobs, revoke_stamped
from celery_capacity.workers.submit.constraints import rate_of

logger = logging.getLogger(__name__)

_COMMANDS: Final = ("revoke", "revoke_by_stamped_headers")

#: Set while this process broadcasts a revoke that the rows know already.
_workers_told: ContextVar[bool] = ContextVar("celery-capacity told", default=False)


class PlatformControl:
    """Mixin for the app's control class."""

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
        """Revoke jobs, by one id or several.

        A job that waits or is scheduled ends at once, for good, with the result REVOKED. If a worker holds a job, the
        worker is told, as Celery does; `terminate` ends the job's process. The job's row keeps the revoke, so that the
        job runs no other attempt. While the ledger does not answer, every job is only marked: it starts no more, and
        ends within the sweep's interval once the ledger answers.

        Raises `InvalidRequest`. Raises `StoreUnavailable`, also where `terminate` is asked for and the broker is away,
        so that no worker can be told.
        """
        ids = [check_job_id(job) for job in ([task_id] if isinstance(task_id, str) else task_id)]
        revoke_jobs(self.app, self.stores, ids)
        with _tells_workers(terminate):
            return super().revoke(task_id, destination=destination, terminate=terminate, signal=signal, **kwargs)  # type: ignore[misc]

    def revoke_by_stamped_headers(
        self, headers: Any, destination: Any = None, terminate: bool = False, signal: str = "SIGTERM", **kwargs: Any
    ) -> Any:
        """Revoke all jobs that carry one of these stamps: {name: value or list of values}. See `revoke`.

        Workers remember the stamps, as Celery's do: a job that is submitted later with one of them ends when it is to
        start.
        """
        revoke_stamped(self.app, self.stores, headers)
        with _tells_workers(terminate):
            return super().revoke_by_stamped_headers(  # type: ignore[misc]
                headers, destination=destination, terminate=terminate, signal=signal, **kwargs
            )

    def purge(self, connection: Any = None) -> int:
        """Empty the queues, and return the number of jobs and messages removed.

        Jobs that wait in the queues' backlogs end as cancelled. Messages of old producers that are not enrolled yet are
        dropped.
        """
        if getattr(connection, "purge_jobs", None) is not None:
            return int(super().purge(connection))  # type: ignore[misc]
        # The connections of a pool are kombu's own, which know of no jobs.
        with self.app.connection_for_write() as write_connection:
            return int(super().purge(write_connection))  # type: ignore[misc]

    discard_all = purge

    def broadcast(
        self, command: Any, arguments: Any = None, destination: Any = None, *more: Any, **options: Any
    ) -> Any:
        """Broadcast a command, as Celery does.

        A rate limit (`rate_limit`, or `celery control rate_limit`) holds for the whole cluster from then on, until
        another one is set. 0 lifts it.
        """
        if command in _COMMANDS and _workers_told.get():
            arguments = {**(arguments or {}), TOLD: True}
        if command == "rate_limit":
            self._set_rate(dict(arguments or {}), destination)
        return super().broadcast(command, arguments, destination, *more, **options)  # type: ignore[misc]

    def _set_rate(self, arguments: dict[str, Any], destination: Any) -> None:
        name, value = arguments.get("task_name"), arguments.get("rate_limit")
        if not isinstance(name, str) or not name:
            raise InvalidRequest(f"task name {show(name)} is not valid", value=name, advice="It must be text.")
        if destination is not None:
            advice = "Leave destination out, as `celery control rate_limit TASK RATE` does."
            raise InvalidRequest("a rate limit holds for the whole cluster", value=destination, advice=advice)
        rate = rate_of(value, "rate_limit") or Rate(0.0, "0")
        with translated(f"the rate limit of {name} was not set: "), self.stores.engine.connect() as connection:
            dependencies.set_rate(connection, name, rate, by_control=True)
        self.app.amqp.job_sender.rates.forget()


@contextmanager
def _tells_workers(terminate: bool) -> Iterator[None]:
    """Have a broadcast of this thread say that the rows know of the revoke.

    While the broker is away the rows are enough, except for jobs that are to be terminated.
    """
    token = _workers_told.set(True)
    try:
        yield
    except OperationalError as error:
        if terminate:
            why = "running jobs were not terminated, the broker does not answer; no attempt follows them"
            raise StoreUnavailable(why) from error
        logger.warning("revoked in Postgres; no worker was told, the broker does not answer: %s", error)
    finally:
        _workers_told.reset(token)


def control_class(base: type = Control, stores: Stores | None = None) -> type:
    """Return the app's control class with the platform's in front of it."""
    return type("Control", (PlatformControl, base), {"stores": stores})
