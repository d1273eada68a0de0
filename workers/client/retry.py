"""Repeat an ended job: a new job with its message and its request, linked to the old one.

The new job has an id of its own. It starts at once, without the old job's time and expiry, and counts its attempts and
Celery's retries anew. Its callbacks and the later steps of its chain follow it. An error names what cannot be repeated
(`NotRetried`), and then nothing was written.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any, Final

from celery import Celery
from kombu.exceptions import KombuError
from kombu.utils.uuid import uuid
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from celery_capacity.routing.database import deadlines
from celery_capacity.routing.database.postgres_errors import one_line, translated
from celery_capacity.routing.errors import (
    InvalidRequest,
    NotAccepted,
    NotRetried,
    OutcomeUnknown,
    PlatformError,
    StoreUnavailable,
    mask_url,
)
from celery_capacity.routing.insert import retries
from celery_capacity.routing.insert.retries import Original, Repeated
from celery_capacity.routing.model import message as messages
from celery_capacity.routing.model.job import NewJob
from celery_capacity.routing.model.message import ETA, HEADER
from celery_capacity.routing.model.states import FINAL, State
from celery_capacity.workers.process.stores import Stores, transactions
from celery_capacity.workers.results.deliver_later import context_of
from celery_capacity.workers.submit.canvas import REPLACES
from celery_capacity.workers.submit.encode import RawMessage
from celery_capacity.workers.submit.sender import Sender

#: Headers of a message that belong to one call of its task, with their values for a new call.
_ANEW: Final = {
    "retries": 0,
    "eta": None,
    "expires": None,
    "parent_id": None,
    "replaced_task_nesting": 0,
}
#: States after which a job is repeated without `again`.
WITHOUT_ASKING: Final = FINAL - {State.SUCCEEDED}


def retry(app: Celery, stores: Stores, job: str, *, again: bool = False) -> str:
    """Repeat an ended job, and return the id of the new job, which is durable on return.

    `again`: also where the job succeeded, or has a retry already. Raises `NotRetried` with the reason,
    `InvalidRequest` for an unknown job, `BacklogFull`, `NotAccepted`, and `OutcomeUnknown` with the new id.
    """
    sender: Sender = app.amqp.job_sender
    began, began_ms = stores.sending.begin(), time.time() * 1000
    original = _read(stores, job)
    _check(job, original, again)
    new = _like(app, sender, job, original)
    sender.check_backlog(None, new.shape)
    repeated = _insert(stores, new, job, original.seq, again)
    if repeated.retried_as is not None:
        raise _retried_already(job, repeated.retried_as)
    inserted = repeated.inserted
    if inserted is None or inserted.seq is None:
        raise NotRetried(f"job {job} is not there any more", value=job, advice="Submit its task anew.")
    sender.bring(new, inserted, began, began_ms)
    return new.id


def failed_jobs(stores: Stores, task: str | None = None, since: float | None = None, again: bool = False) -> list[str]:
    """Return the jobs that failed or were lost, oldest first, as `routing.insert.retries.failed_jobs`."""
    with translated(), stores.engine.connect() as connection:
        return retries.failed_jobs(connection, task, since, again)


def _read(stores: Stores, job: str) -> Original:
    with translated(f"job {job} was not retried: "), stores.engine.connect() as connection:
        original = retries.read_original(connection, job)
        archived = original is None and retries.is_archived(connection, job)
    if original is not None:
        return original
    if archived:
        advice = "Submit its task anew; PLATFORM_KEEP_FINISHED says how long messages are kept."
        raise NotRetried(f"job {job} is archived, and its message is gone", value=job, advice=advice)
    raise InvalidRequest(f"there is no job {job}", value=job, advice="`celery -A platform jobs` lists the newest.")


def _check(job: str, original: Original, again: bool) -> None:
    if original.state not in FINAL:
        advice = "Wait for its end, or cancel it first."
        raise NotRetried(f"job {job} has not ended, it is {original.state.value}", value=job, advice=advice)
    if original.replaces is not None:
        advice = f"Retry that one: {original.replaces}."
        raise NotRetried(f"job {job} is a step in the replacement of another job", value=job, advice=advice)
    if again:
        return
    if original.retried_as is not None:
        raise _retried_already(job, original.retried_as)
    if original.state not in WITHOUT_ASKING:
        advice = "--again, or again=True, runs it once more."
        raise NotRetried(f"job {job} has succeeded", value=job, advice=advice)


def _retried_already(job: str, retried_as: str) -> NotRetried:
    advice = "--again, or again=True, makes another retry."
    return NotRetried(f"job {job} was retried already, as {retried_as}", value=job, advice=advice)


def _like(app: Celery, sender: Sender, job: str, original: Original) -> NewJob:
    """Return a new job with the message of another. Raises `NotRetried` for a part of a chord, `InvalidRequest`."""
    new = uuid()
    envelope = messages.decode(original.message)
    _check_chord(app, job, original.message)
    headers = {**envelope["headers"], **_ANEW, "id": new, "root_id": new}
    carried = {name: value for name, value in dict(headers.get(HEADER) or {}).items() if name != ETA}
    headers[HEADER] = carried
    headers.pop(REPLACES, None)
    properties: dict[str, Any] = {**envelope["properties"], "correlation_id": new}
    queue = properties["delivery_info"]["routing_key"]
    body = messages.body_of(envelope)
    content_type, encoding = envelope["content-type"], envelope["content-encoding"]
    with sender.in_time():
        made = sender.encoder.job_of(RawMessage(body, content_type, encoding, headers, queue, properties))
    # The message has no limits by key, and they concern each run of the job.
    return replace(made, key_limits=original.key_limits)


def _check_chord(app: Celery, job: str, message: bytes) -> None:
    try:
        chord = context_of(app, message).chord
    except (KombuError, PlatformError, ValueError, TypeError, KeyError) as error:
        advice = "Retry it with an app that reads its serializer (accept_content)."
        raise NotRetried(f"the message of job {job} cannot be read: {error}", value=job, advice=advice) from error
    if chord:
        advice = "Submit the chord anew."
        raise NotRetried(f"job {job} is part of a chord, which counted its end already", value=job, advice=advice)


def _insert(stores: Stores, new: NewJob, job: str, seq: int, again: bool) -> Repeated:
    """Insert the new job and the link in one transaction. Raises `NotAccepted`, `OutcomeUnknown`."""
    committing = False
    try:
        with deadlines.within(stores.settings.store_timeout), transactions(stores.engine).connect() as connection:
            repeated = retries.insert_retry(connection, new, job, seq, again)
            if repeated.inserted is not None:
                committing = True
                connection.commit()
            return repeated
    except PoolTimeout as error:
        raise StoreUnavailable(f"job {job} was not retried: no connection to Postgres was free") from error
    except DBAPIError as error:
        if committing and error.connection_invalidated and not deadlines.unsent(error):
            why = f"the connection broke while the retry {new.id} of job {job} was stored; it may have been accepted"
            raise OutcomeUnknown(new.id, why, advice=f"`celery -A platform job {job}` says so.") from error
        raise NotAccepted(f"Postgres refused the retry of job {job}: {mask_url(one_line(error))}") from error
