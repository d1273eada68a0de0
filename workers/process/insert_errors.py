"""Errors of an insert as the submitter gets them: nothing was written, or the outcome is unknown."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from celery_capacity.routing.database import deadlines
from celery_capacity.routing.database.postgres_errors import one_line
from celery_capacity.routing.errors import NotAccepted, OutcomeUnknown, mask_url
from celery_capacity.workers.process.stores import Stores

T = TypeVar("T")


def insert_safely(stores: Stores, job: str, insert: Callable[[], T]) -> T:
    """Insert a job's row, and try once more on another connection where the first connection broke.

    Raises `NotAccepted` where nothing was written, `OutcomeUnknown` where the row may be there.
    """
    try:
        return insert()
    except DBAPIError as error:
        if not error.connection_invalidated or deadlines.unsent(error):
            raise NotAccepted(f"Postgres refused job {job}: {mask_url(one_line(error))}") from error
        stores.doubt_connections()
        if deadlines.left() <= 0:
            why = f"Postgres did not answer in time while job {job} was stored; it may have been accepted"
            raise OutcomeUnknown(job, why) from error
        # The connection was lost around the commit. To repeat the statement on a new connection is safe: a row that is
        # there already is left as it is.
        try:
            return insert()
        except (PoolTimeout, DBAPIError) as again:
            raise OutcomeUnknown(job) from again
    except PoolTimeout as error:
        raise NotAccepted(f"no connection to Postgres was free for job {job}") from error


def may_pass(error: BaseException) -> bool:
    """Return True if Postgres did not answer, rather than refuse the insert."""
    return isinstance(error, OutcomeUnknown) or isinstance(error.__cause__, (OperationalError, PoolTimeout))
