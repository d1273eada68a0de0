"""Waiting at the start for stores that are down: a worker whose stores come later than itself is not misconfigured."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable, Iterator
from typing import Final, TypeVar

import psycopg2
from redis import exceptions as redis_errors
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from celery_capacity.routing.database.postgres import NOT_ALLOWED, READ_ONLY
from celery_capacity.routing.errors import PlatformError, mask_url

logger = logging.getLogger(__name__)

#: Seconds between two tries.
AGAIN_AFTER: Final = 0.5
#: What may stop a start and pass.
TROUBLE: Final = (PlatformError, SQLAlchemyError, redis_errors.RedisError)

#: What Redis answers that no waiting changes, and what it answers while it cannot serve yet.
_REFUSED: Final = (redis_errors.AuthenticationError, redis_errors.AuthorizationError)
_PASSING: Final = (
    redis_errors.ConnectionError,
    redis_errors.TimeoutError,
    redis_errors.ReadOnlyError,
    redis_errors.TryAgainError,
)
#: What Redis says while its disk takes no snapshot: it writes again when there is room.
_NO_SNAPSHOT: Final = "MISCONF "
#: Parts of what Postgres says to who may not come in, or names a database that is not there. (The driver gives no
#: SQLSTATE of a connection that was refused. A server that speaks another language is waited for, with its words.)
_UNWELCOME: Final = (
    "authentication failed",
    "no pg_hba.conf entry",
    "no password supplied",
    "does not exist",
    "is not permitted to log in",
    "permission denied",
    "certificate verify failed",
    # What the driver itself does not take: an option of the URL, or its value.
    "invalid dsn",
    "invalid connection option",
    "invalid sslmode value",
    "invalid port number",
)
#: What Redis says where the database's number is above those that it has.
_NO_DATABASE: Final = "DB index is out of range"

T = TypeVar("T")


def may_pass(error: BaseException) -> bool:
    """Whether waiting helps: a store does not answer (yet), rather than refuse what it was asked."""
    for one in _chain(error):
        if isinstance(one, (*_REFUSED, ssl.SSLCertVerificationError)):
            return False
        if isinstance(one, (PoolTimeout, *_PASSING)):
            return True
        if isinstance(one, redis_errors.ResponseError) and str(one).startswith(_NO_SNAPSHOT):
            return True
        if isinstance(one, DBAPIError) and getattr(one.orig, "pgcode", None) == READ_ONLY:
            return True
        if isinstance(one, DBAPIError) and isinstance(one.orig, (psycopg2.OperationalError, psycopg2.InterfaceError)):
            return not any(words in str(one.orig) for words in _UNWELCOME)
    return False


def refused(error: BaseException) -> bool:
    """Whether a store answered and does not let this process in: no waiting changes that, another user or password
    does."""
    for one in _chain(error):
        if isinstance(one, (*_REFUSED, ssl.SSLCertVerificationError)):
            return True
        if isinstance(one, redis_errors.ResponseError) and _NO_DATABASE in str(one):
            return True
        if isinstance(one, DBAPIError) and isinstance(one.orig, psycopg2.Error):
            return one.orig.pgcode == NOT_ALLOWED or any(words in str(one.orig) for words in _UNWELCOME)
    return False


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def when_stores_answer(action: Callable[[], T], wait: Callable[[float], object]) -> T:
    """Do what needs the stores, as soon as they let it. Says what it waits for, once for each change, and raises what
    no waiting changes. `wait` waits for so many seconds, and raises where the process is to end."""
    said = ""
    while True:
        try:
            done = action()
        except TROUBLE as error:
            if not may_pass(error):
                raise
            says = mask_url(" ".join(str(error).split()))
            if says != said:
                said = says
                logger.warning("waiting for a store: %s", says)
        else:
            if said:
                logger.warning("the stores answer")
            return done
        wait(AGAIN_AFTER)
