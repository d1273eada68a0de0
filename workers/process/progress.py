"""Progress that a body reports, written to its job's row at most once a second, and once more at the body's end.

The thread of the body writes it. A failure to write is logged and never reaches the body: the next report tries again,
a little later. The write at the end holds the slot and the result, so it is short, and none follows a failure.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Final

from celery import current_app
from celery.exceptions import SoftTimeLimitExceeded

from celery_capacity.routing.database import deadlines
from celery_capacity.routing.errors import InvalidRequest, show, storable
from celery_capacity.routing.store.fencing import write_progress
from celery_capacity.workers.process.attempts import Attempt, current
from celery_capacity.workers.process.stores import stores_of

logger = logging.getLogger(__name__)

#: Seconds between two writes for one job.
EVERY: Final = 1.0
#: Seconds until the next try after Postgres did not take a write, and seconds of a write at the most.
AGAIN_AFTER: Final = 10.0
WITHIN: Final = 2.0
#: Seconds of the last write at the most: the result waits for it.
LAST_WITHIN: Final = 0.5
#: Characters of a message that are kept.
MESSAGE_LENGTH: Final = 200
_ADVICE: Final = "Call it as progress(done, total, message='...'), with numbers that are 0 or more."


def progress(done: float, total: float | None = None, message: str | None = None) -> None:
    """Report how far the body of this thread has come: `done` of `total`, in any unit, with a few words beside it.

    The row of the job keeps the newest report. Reports within a second are one write, of the last of them. Outside of
    a running attempt, as in a test that calls the task itself, nothing is kept. Raises `InvalidRequest`.
    """
    if not _is_amount(done):
        raise InvalidRequest(f"progress: done {show(done)} is not valid", value=done, advice=_ADVICE)
    if total is not None and not _is_amount(total):
        raise InvalidRequest(f"progress: total {show(total)} is not valid", value=total, advice=_ADVICE)
    if message is not None and not isinstance(message, str):
        raise InvalidRequest(f"progress: message {show(message)} is not text", value=message, advice=_ADVICE)
    report(done, total, message)


def report_meta(meta: Any) -> None:
    """Report the progress in the `meta` of Celery's `update_state`: `current`, `total`, and `message` or `status`.

    Other metadata are a task's own, and are not looked at.
    """
    if not isinstance(meta, Mapping) or not _is_amount(meta.get("current")):
        return
    total, message = meta.get("total"), meta.get("message", meta.get("status"))
    report(meta["current"], total if _is_amount(total) else None, message if isinstance(message, str) else None)


def report(done: float, total: float | None, message: str | None) -> None:
    """Keep a report of this thread's attempt, and write it unless one was written within a second."""
    attempt = current()
    if attempt is None:
        return
    attempt.reported.pending = {
        "current": done,
        "total": total,
        "message": None if message is None else storable(message, MESSAGE_LENGTH),
        "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
    }
    if time.monotonic() >= attempt.reported.next_at:
        write_pending(attempt)


def write_last(attempt: Attempt) -> None:
    """Write the report that an ended body left. Raises nothing.

    After a failed write there is none before its next time: each job would hold its slot while Postgres is away.
    """
    reported = attempt.reported
    if reported.pending is None or (reported.failed and time.monotonic() < reported.next_at):
        return
    # The body is over, so its time limit is no matter any more.
    with suppress(SoftTimeLimitExceeded):
        write_pending(attempt, LAST_WITHIN)


def write_pending(attempt: Attempt, seconds: float = WITHIN) -> None:
    """Write the last report of an attempt that is not written yet. Raises nothing but the body's soft time limit."""
    reported = attempt.reported
    stores = stores_of(current_app)
    if reported.pending is None or stores is None:
        return
    try:
        with deadlines.within(seconds), stores.engine.connect() as connection:
            write_progress(connection, attempt.publisher, reported.pending)
    except SoftTimeLimitExceeded:
        raise
    except Exception as error:
        reported.failed, reported.next_at = True, time.monotonic() + AGAIN_AFTER
        logger.warning("the progress of job %s was not written: %s", attempt.tag.job, type(error).__name__)
        return
    reported.pending, reported.failed = None, False
    reported.next_at = time.monotonic() + EVERY


def _is_amount(value: Any) -> bool:
    """Return True for a number that any reader of JSON can hold."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= sys.float_info.max
