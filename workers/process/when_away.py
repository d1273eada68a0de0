"""Policy of a submission for a Postgres that is away: refuse the job, keep it for the attempt's end, or wait."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from enum import Enum
from typing import Final, TypeVar

from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from celery_capacity.routing.database import deadlines
from celery_capacity.routing.errors import NotAccepted, OutcomeUnknown
from celery_capacity.routing.model.job import NewJob
from celery_capacity.workers.process.attempts import Attempt
from celery_capacity.workers.process.stores import Stores

#: Seconds for which jobs that attempts publish are kept, without asking a Postgres that did not answer.
POSTGRES_PAUSE: Final = 2.0
#: Seconds between tries of an attempt that waits for Postgres.
AGAIN_AFTER: Final = 0.2

T = TypeVar("T")

logger = logging.getLogger(__name__)


class WhenAway(Enum):
    """Policy for a job whose row cannot be written, since Postgres does not answer."""

    #: Raise the error. The caller of `delay()` decides what follows.
    REFUSE = "refuse"
    #: Keep the job, so that it goes with the end of the attempt that publishes it.
    KEEP = "keep"
    #: Try again until Postgres answers, as long as the attempt may wait.
    WAIT = "wait"


def policy_of(attempt: Attempt | None) -> WhenAway:
    """Return the policy for the jobs that an attempt publishes. None: for those of a program outside of any."""
    if attempt is None:
        return WhenAway.REFUSE
    # The end of a patient attempt has come already, and can take no job along.
    return WhenAway.KEEP if attempt.patient is None else WhenAway.WAIT


class RowWriter:
    """Writer of rows, by the policy of the attempt that publishes them. Thread-safe."""

    def __init__(self, stores: Stores) -> None:
        self._stores = stores
        #: Time (monotonic) until which jobs of attempts are kept, without asking.
        self._keep_until = 0.0

    def may_ask(self, attempt: Attempt | None) -> bool:
        """Return True if this thread may wait for Postgres now, as a part of the attempt."""
        return attempt is None or not (attempt.deferred or time.monotonic() < self._keep_until)

    def write(self, write: Callable[[], T], jobs: Sequence[NewJob], attempt: Attempt | None) -> T | None:
        """Write the rows of jobs by `write`, and return its result. None: the attempt keeps the jobs for its end.

        Raises what `write` raises: `NotAccepted` or `OutcomeUnknown` where Postgres refuses the jobs, and also where it
        is away and the policy says so.
        """
        when_away = policy_of(attempt)
        if attempt is None or when_away is WhenAway.REFUSE:
            return write()
        if when_away is WhenAway.KEEP and not self.may_ask(attempt):
            attempt.keep(jobs)
            return None
        pause = threading.Event()
        while True:
            try:
                with self._one_try(when_away):
                    return write()
            except (NotAccepted, OutcomeUnknown) as error:
                if not is_away(error):
                    raise
                if when_away is WhenAway.KEEP:
                    logger.warning(
                        "Postgres is away: what job %s publishes goes with its end: %s", attempt.tag.job, error
                    )
                    self._keep_until = time.monotonic() + POSTGRES_PAUSE
                    attempt.keep(jobs)
                    return None
                if attempt.patient is None or not attempt.patient():
                    raise
            pause.wait(AGAIN_AFTER)

    def _one_try(self, when_away: WhenAway) -> AbstractContextManager[object]:
        """Return the deadline of one try. An attempt that waits begins each try with all of its time."""
        if when_away is WhenAway.WAIT:
            return deadlines.within(self._stores.settings.store_timeout, anew=True)
        return nullcontext()


def is_away(error: BaseException) -> bool:
    """Return True if Postgres did not answer, rather than refuse the insert."""
    return isinstance(error, OutcomeUnknown) or isinstance(error.__cause__, (OperationalError, PoolTimeout))
