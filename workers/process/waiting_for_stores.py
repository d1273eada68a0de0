"""Wait at the start for stores that are down: a worker that starts before its stores is not misconfigured."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable, Iterator
from typing import Final, TypeVar

import psycopg2
from redis import exceptions as redis_errors
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from celery_capacity.routing.database.postgres_errors import NOT_ALLOWED, READ_ONLY
from celery_capacity.routing.errors import PlatformError, mask_url
from celery_capacity.routing.lasting_warning import LastingWarning

logger = logging.getLogger(__name__)

#: Seconds between two tries.
AGAIN_AFTER: Final = 0.5
#: Errors that may stop a start and may pass.
TROUBLE: Final = (PlatformError, SQLAlchemyError, redis_errors.RedisError)

#: Answers of Redis that no waiting changes, and answers while it cannot serve yet.
_REFUSED: Final = (redis_errors.AuthenticationError, redis_errors.AuthorizationError)
_PASSING: Final = (
    redis_errors.ConnectionError,
    redis_errors.TimeoutError,
    redis_errors.ReadOnlyError,
    redis_errors.TryAgainError,
)
#: Beginning of Redis's answer while its disk takes no snapshot: it writes again when there is room.
_NO_SNAPSHOT: Final = "MISCONF "
#: Parts of Postgres's answers to a user who may not come in, or who names a database that is not there. The driver
#: gives no SQLSTATE of a refused connection. A server that speaks another language is waited for, with its words.
_UNWELCOME: Final = (
    "authentication failed",
    "no pg_hba.conf entry",
    "no password supplied",
    "does not exist",
    "is not permitted to log in",
    "permission denied",
    "certificate verify failed",
    # Refusals of the driver itself: an option of the URL, or its value.
    "invalid dsn",
    "invalid connection option",
    "invalid sslmode value",
    "invalid port number",
)
#: Part of Redis's answer where the database's number is above those that it has.
_NO_DATABASE: Final = "DB index is out of range"

T = TypeVar("T")


def may_pass(error: BaseException) -> bool:
    """Return True if waiting helps: a store does not answer, or not yet, rather than refuse the request."""
    for exc in _chain(error):
        if isinstance(exc, (*_REFUSED, ssl.SSLCertVerificationError)):
            return False
        if isinstance(exc, (PoolTimeout, *_PASSING)):
            return True
        if isinstance(exc, redis_errors.ResponseError) and str(exc).startswith(_NO_SNAPSHOT):
            return True
        if isinstance(exc, DBAPIError) and getattr(exc.orig, "pgcode", None) == READ_ONLY:
            return True
        if isinstance(exc, DBAPIError) and isinstance(exc.orig, (psycopg2.OperationalError, psycopg2.InterfaceError)):
            return not any(words in str(exc.orig) for words in _UNWELCOME)
    return False


def refused(error: BaseException) -> bool:
    """Return True if a store answered and does not let this process in.

    No waiting changes that; another user or password does.
    """
    for exc in _chain(error):
        if isinstance(exc, (*_REFUSED, ssl.SSLCertVerificationError)):
            return True
        if isinstance(exc, redis_errors.ResponseError) and _NO_DATABASE in str(exc):
            return True
        if isinstance(exc, DBAPIError) and isinstance(exc.orig, psycopg2.Error):
            return exc.orig.pgcode == NOT_ALLOWED or any(words in str(exc.orig) for words in _UNWELCOME)
    return False


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def when_stores_answer(action: Callable[[], T], wait: Callable[[float], object]) -> T:
    """Run an action that needs the stores as soon as they let it, and return its result.

    Logs the reason for waiting, once for each change. Raises an error that no waiting changes. `wait` waits for the
    seconds that it gets, and raises where the process is to end.
    """
    warning = LastingWarning(logger)
    while True:
        try:
            done = action()
        except TROUBLE as error:
            if not may_pass(error):
                raise
            warning.warn(f"waiting for a store: {mask_url(' '.join(str(error).split()))}")
        else:
            if warning.over():
                logger.warning("the stores answer")
            return done
        wait(AGAIN_AFTER)
