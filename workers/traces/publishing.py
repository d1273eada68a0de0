"""Span of a submission, where `PLATFORM_TRACES` is on. Off, nothing of OpenTelemetry is imported."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from celery_capacity.routing.config.settings import Settings
from celery_capacity.workers.process import attempts
from celery_capacity.workers.traces import worker


def sending(
    settings: Settings, body: Any, message: Mapping[str, Any], operation: str = "send"
) -> AbstractContextManager[Mapping[str, Any]]:
    """Return the block of a submission: it yields the message, with the context of its span in the headers.

    `message`: the parameters of `Encoder.encode`. `operation`: `create` for a job that is stored with others later.
    """
    if not settings.traces:
        return nullcontext(message)
    from celery_capacity.workers.traces import spans

    # A message of protocol 1 has its fields in the body.
    fields = body if isinstance(body, Mapping) else message["headers"]
    attempt = attempts.current()
    parent = None if attempt is None else worker.context_of(attempt)
    return spans.sending(message, str(fields.get("task")), operation, parent, in_body=attempt is not None)
