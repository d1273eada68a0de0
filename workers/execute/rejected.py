"""Messages of the worker's own queue: their attempts, and those that never become a request (unknown, invalid ...)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from celery import Celery
from celery.app.task import Context
from celery.exceptions import InvalidTaskError

from celery_capacity.routing import format_versions
from celery_capacity.routing.model.envelope import Unreadable
from celery_capacity.routing.model.identifiers import check_job_id
from celery_capacity.routing.model.message import HEADER, Tag, parse_tag
from celery_capacity.routing.model.reasons import Refusal
from celery_capacity.routing.model.request import Request
from celery_capacity.routing.model.states import Outcome
from celery_capacity.workers.broker import transport
from celery_capacity.workers.process.attempts import Attempt, held
from celery_capacity.workers.process.identity import Identity
from celery_capacity.workers.results.backends import kept_of
from celery_capacity.workers.results.quarantine_thread import QuarantineThread


def attempt_of(message: Any) -> tuple[Tag, Request]:
    """Return the attempt of a message of the private queue, and its request. Raises `PlatformError`, `Unreadable`."""
    tag, carried = parse_tag(message.delivery_tag), message.headers.get(HEADER)
    if tag is None or not isinstance(carried, dict):
        raise Unreadable("no message of an attempt")
    check_job_id(tag.job)
    # In a format that this release does not know, the tag alone is sure. The job is claimed, and handed back.
    readable = format_versions.is_known(carried)
    return tag, Request.from_shape(str(carried.get("shape"))) if readable else Request.of({})


def take_raw(raw: bytes, accept: Any, quarantine: QuarantineThread, queue: str, arrived: Callable[[Any], None]) -> None:
    """Pass on a message of the ledger queue, or set it aside where nobody can read it; in the thread of the queue."""
    try:
        message = transport.job_message(raw, accept)
    except Unreadable as error:
        quarantine.set_aside(raw, queue, error.reason, str(error))
        return
    arrived(message)


@contextmanager
def refusing(
    message: Any,
    error: str,
    identity: Identity,
    app: Celery,
    quarantine: QuarantineThread,
    end_job: Callable[..., bool],
    failed: Callable[[str, Any, Exception], None],
) -> Iterator[None]:
    """End the job of a message that never becomes a request.

    Everything that Celery says of the job within the block goes with the end. Where Celery says nothing, `failed` is
    called with the job, the task's name and the error.
    """
    tag = parse_tag(message.delivery_tag) if isinstance(message, transport.JobMessage) else None
    if tag is None:
        # A message of remote control, which belongs to no job. Its routing key is its sender's choice.
        queue = getattr(message, "read_from", "")
        quarantine.set_aside(transport.raw_of(message), queue, Refusal.UNDECODABLE, error)
        yield
        return
    attempt = Attempt(tag, identity.incarnation, deferred=True)
    try:
        with held(attempt):
            yield
            if not attempt.outbox:
                # Celery says nothing of most such messages, and a waiting client would wait for ever.
                answer = {name: message.properties.get(name) for name in ("reply_to", "correlation_id")}
                headers = message.headers if isinstance(message.headers, dict) else {}
                # A task name that is not a string matches no task.
                name = headers.get("task") if isinstance(headers.get("task"), str) else None
                request = Context(id=tag.job, task=name, ignore_result=headers.get("ignore_result"), **answer)
                _, kept = kept_of(app, request)
                problem = InvalidTaskError(error)
                app.backend.mark_as_failure(tag.job, problem, request=request, store_result=kept)
                failed(tag.job, name, problem)
    finally:
        end_job(tag.job, tag.token, Outcome.FAILED, error, attempt.outbox, None)
