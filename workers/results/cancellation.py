"""End jobs that no worker has started: revoked, purged, expired, infeasible, or in need of a job that failed."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Final

from celery_capacity.routing.database.authority import read_authority
from celery_capacity.routing.database.postgres_errors import is_locked, translated
from celery_capacity.routing.errors import InvalidRequest, StoreUnavailable
from celery_capacity.routing.ledger.replies import Cancelled, CancelVerdict, LedgerClosed
from celery_capacity.routing.model.states import State, Store
from celery_capacity.routing.recovery import revocation, transition_log
from celery_capacity.routing.store import backlog, dependencies
from celery_capacity.routing.store.dependencies import Opened
from celery_capacity.routing.store.job_transitions import REVOKED
from celery_capacity.workers.process.stores import Stores
from celery_capacity.workers.results.deliver_later import deliver_rows

logger = logging.getLogger(__name__)

#: Argument of a broadcast revoke whose rows are updated already (see `workers.app.remote_control`).
TOLD: Final = "told"
#: The error of a job that `celery purge` ended.
PURGED: Final = "purged"


def revoke_jobs(app: Any, stores: Stores, ids: Sequence[str]) -> int:
    """Revoke jobs in the stores: end waiting jobs, mark jobs that a worker holds. Return how many ended."""
    with translated("nothing was revoked: "), stores.engine.connect() as connection:
        jobs = revocation.mark(connection, ids)
    ended = [job for job in jobs if carry_out(stores, job)]
    if ended:
        # A worker's duty brings results that the backend does not take now.
        deliver_rows(app, stores, ended)
        lift_constraints(app, stores)
    return len(ended)


def revoke_stamped(app: Any, stores: Stores, headers: Any) -> int:
    """Revoke the jobs that carry these stamps; return how many ended. Raises `InvalidRequest` for invalid stamps."""
    if not isinstance(headers, Mapping) or not all(isinstance(name, str) for name in headers):
        raise InvalidRequest(
            "stamped headers are a mapping of names to values", value=headers, advice="Pass {'name': ['value', ...]}."
        )
    with translated("nothing was revoked: "), stores.engine.connect() as connection:
        jobs = revocation.stamped(connection, headers)
    return revoke_jobs(app, stores, jobs)


def carry_out(stores: Stores, job: str) -> bool:
    """Carry out the revoke of a job whose row is marked; return True if it ended.

    A waiting job is ended. A job that a worker holds is marked in the ledger. The sweep does later what a store does
    not take now.
    """
    for _ in range(revocation.TRIES):
        try:
            if end_before_start(stores, job, State.CANCELLED, REVOKED):
                return True
        except StoreUnavailable as error:
            if not is_locked(error):
                raise
            logger.warning("job %s was revoked, and its row is locked: it ends later", job)
            return False
        with translated(f"job {job} was not revoked: "), stores.engine.connect() as connection:
            authority = read_authority(connection).authority
        if authority == Store.POSTGRES:
            # The mark in the row is enough, and the ledger's server may never answer.
            return False
        try:
            if stores.ledger.revoke(job):
                return False
        except (LedgerClosed, StoreUnavailable):
            return False
    return False


def purge_queue(app: Any, stores: Stores, queue: str) -> int:
    """End the jobs that wait in a queue's backlog, as cancelled; return how many.

    Scheduled jobs stay. So do the tasks that a Celery worker holds until their time.
    """
    purged = 0
    with stores.engine.connect() as connection:
        for jobs in revocation.waiting_in(connection, queue):
            ended = [job for job in jobs if end_before_start(stores, job, State.CANCELLED, PURGED)]
            deliver_rows(app, stores, ended)
            purged += len(ended)
    if purged:
        lift_constraints(app, stores)
    return purged


def lift_constraints(app: Any, stores: Stores) -> Opened:
    """Bring in jobs that waited for ended jobs, and tell the end of those that can never start."""
    opened = dependencies.open_needs(stores.engine)
    if opened.cancelled:
        deliver_rows(app, stores, opened.cancelled)
        stores.sending.ask(lambda ledger: ledger.announce(opened.cancelled))
    return opened


def end_before_start(stores: Stores, job: str, state: State, error: str) -> bool:
    """End a job that no worker holds, as cancelled, expired or failed; return True if it ended.

    False: a worker holds the job, it has ended before, or the ledger does not say.
    """
    with translated(f"job {job} was not ended: "), stores.engine.connect() as connection:
        current = read_authority(connection)
        if current.authority == Store.POSTGRES:
            return backlog.end_unfiled(connection, job, state, error)
        stores.ledger.epoch = current.epoch
        cancelled = _cancel(stores, connection, job, state, error)
        if cancelled.entry is not None:
            # Write the entry here, since perhaps no worker lives that would.
            transition_log.apply_entry(stores.engine, stores.ledger, cancelled.entry)
            return True
        ended = cancelled.verdict is CancelVerdict.MISSING and backlog.end_unfiled(connection, job, state, error)
        if ended:
            stores.sending.ask(lambda ledger: ledger.announce([job]))
        return ended


def _cancel(stores: Stores, connection: Any, job: str, state: State, error: str) -> Cancelled:
    """Cancel a job in the ledger; return `unsure` while the ledger does not answer.

    Then nobody can say where the job is: the ledger is ahead of the row, and a worker may run a job whose row says
    `accepted`. So the job keeps its state, and a duty ends it later.
    """
    try:
        return stores.ledger.cancel(job, state, error)
    except LedgerClosed:
        stores.ledger.epoch = store_epoch(connection)
    except StoreUnavailable:
        return Cancelled(CancelVerdict.UNSURE)
    try:
        return stores.ledger.cancel(job, state, error)
    except (LedgerClosed, StoreUnavailable):
        return Cancelled(CancelVerdict.UNSURE)


def store_epoch(connection: Any) -> int:
    return read_authority(connection).epoch
