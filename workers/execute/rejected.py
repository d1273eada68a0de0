"""Messages of the worker's own queue that never become a request: unknown, invalid, undecodable, not to be started."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from celery import Celery
from celery.app.task import Context
from celery.exceptions import InvalidTaskError

from celery_capacity.routing.model.message import parse_tag
from celery_capacity.workers.broker import transport
from celery_capacity.workers.process.attempts import Attempt, held
from celery_capacity.workers.process.identity import Identity
from celery_capacity.workers.results.backends import kept_of
from celery_capacity.workers.results.quarantine import Quarantine


@contextmanager
def refusing(
    message: Any,
    error: str,
    identity: Identity,
    app: Celery,
    quarantine: Quarantine,
    end_job: Callable[..., bool],
    failed: Callable[[str, Any, Exception], None],
) -> Iterator[None]:
    """A message that never becomes a request ends its job; what Celery says of it within goes with the end. `failed`
    is told (job, task's name, error) where it says nothing."""
    tag = parse_tag(message.delivery_tag) if isinstance(message, transport.JobMessage) else None
    if tag is None:
        # Of remote control, which is no job's.
        queue = str((message.delivery_info or {}).get("routing_key") or "")
        quarantine.set_aside(transport.raw_of(message), queue, error)
        yield
        return
    attempt = Attempt(tag, identity.incarnation, deferred=True)
    try:
        with held(attempt):
            yield
            if not attempt.outbox:
                # Celery says nothing of most of them, and whoever waits would wait for ever.
                answer = {name: message.properties.get(name) for name in ("reply_to", "correlation_id")}
                headers = message.headers if isinstance(message.headers, dict) else {}
                # (A name that is none is no task's.)
                name = headers.get("task") if isinstance(headers.get("task"), str) else None
                request = Context(id=tag.job, task=name, ignore_result=headers.get("ignore_result"), **answer)
                _, kept = kept_of(app, request)
                problem = InvalidTaskError(error)
                app.backend.mark_as_failure(tag.job, problem, request=request, store_result=kept)
                failed(tag.job, name, problem)
    finally:
        end_job(tag.job, tag.token, "failed", error, attempt.outbox, None)
