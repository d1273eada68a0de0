"""Spans of a job, by OpenTelemetry's API. Imported only where `PLATFORM_TRACES` is on.

The context travels in the headers of the job's message, as the propagators of this process write it: `traceparent` and
`tracestate` of W3C by default. All spans of an attempt are children of the span that sent its message, so that they
stand beside each other in the order of their times::

    send TASK ┬ waiting ┬ admitted ┬ run TASK (spans of the body's own) ┬ result

With OpenTelemetry's own instrumentation of Celery beside it, the producer's span is that one's, and the consumer's span
of that one is inside `run TASK`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Any, Final, NamedTuple

from billiard.einfo import ExceptionWithTraceback
from celery import signals
from celery.exceptions import Ignore, Retry
from opentelemetry import propagate, trace
from opentelemetry.context import Context, attach, detach
from opentelemetry.propagators.textmap import Getter
from opentelemetry.trace import Span, SpanKind, Status, StatusCode

from celery_capacity.routing.config.redaction import hidden_lines
from celery_capacity.routing.errors import PlatformError
from celery_capacity.routing.model.message import ACCEPTED, ETA, HEADER
from celery_capacity.routing.model.request import TENANT, Request
from celery_capacity.routing.model.states import Outcome
from celery_capacity.routing.policy.tenants import DEFAULT_TENANT
from celery_capacity.workers.traces.guard import guarded

#: Name of the scope of all spans, and prefix of their attributes.
SCOPE: Final = "celery_capacity"
#: Module whose handlers of Celery's signals make spans of calls and bodies.
INSTRUMENTATION: Final = "opentelemetry.instrumentation.celery"
#: Outcomes of an attempt that are no errors.
GOOD: Final = frozenset(
    {Outcome.SUCCEEDED, Outcome.RETRIED, Outcome.REPLACED, Outcome.HANDED_BACK, Outcome.REQUEUED, Outcome.CANCELLED}
)
#: Nanoseconds of a millisecond.
_MS: Final = 1_000_000

Headers = Mapping[str, Any]
#: Return of Celery's trace function: failed, the value or the exception's information, and the run time.
Returned = tuple[Any, Any, Any]


class Admission(NamedTuple):
    """Facts of an attempt that its worker has when it gives the body to the pool. Times in nanoseconds of its clock.

    `request`: the held amounts in people's units.
    """

    worker: str
    attempt: int
    request: Mapping[str, int | float]
    admitted_ns: int
    claimed_ns: int


class _Getter(Getter[Headers]):
    """Reader of the context in a message's headers. Any sender writes these: only text is read."""

    def get(self, carrier: Headers, key: str) -> list[str] | None:
        value = carrier.get(key)
        return [value] if isinstance(value, str) else None

    def keys(self, carrier: Headers) -> list[str]:
        return list(carrier)


_GETTER: Final = _Getter()


def _tracer() -> trace.Tracer:
    return trace.get_tracer(SCOPE)


def _is_valid(context: Context | None) -> bool:
    return trace.get_current_span(context).get_span_context().is_valid


def extracted(headers: Headers) -> Context | None:
    """Return the context that headers carry, None where they carry none."""
    context = propagate.extract(headers, Context(), _GETTER)
    return context if _is_valid(context) else None


def carried(headers: Headers) -> dict[str, str]:
    """Return the headers that carry the context."""
    fields = propagate.get_global_textmap().fields
    return {name: headers[name] for name in sorted(fields) if isinstance(headers.get(name), str)}


def injected() -> dict[str, str]:
    """Return the headers of this thread's context."""
    headers: dict[str, str] = {}
    propagate.inject(headers)
    return headers


@contextmanager
def continuing(headers: Headers) -> Iterator[None]:
    """Give this thread the context that headers carry, within the block."""
    token = attach(guarded(propagate.extract, headers, Context(), _GETTER) or Context())
    try:
        yield
    finally:
        detach(token)


def is_instrumented(signal: Any) -> bool:
    """Return True if OpenTelemetry's instrumentation of Celery listens to a signal."""
    return any(getattr(handler, "__module__", None) == INSTRUMENTATION for _, handler in signal.receivers or ())


@contextmanager
def sending(
    message: Mapping[str, Any], name: str, operation: str, parent: Context | None, *, in_body: bool
) -> Iterator[Mapping[str, Any]]:
    """Make the span of a submission, and yield the message with its context in the headers.

    `operation`: `send`, or `create` for a job that is stored with others later. `parent`: the context to continue where
    this thread has none. `in_body`: a job publishes the message.
    """
    begun = guarded(_begin_sending, message, name, operation, parent, in_body)
    if begun is None:
        yield message
        return
    span, headers = begun
    try:
        with trace.use_span(span, record_exception=False, set_status_on_exception=False):
            yield {**message, "headers": headers}
    except Exception as error:
        guarded(_failed, span, error)
        raise
    finally:
        guarded(span.end)


def _begin_sending(
    message: Mapping[str, Any], name: str, operation: str, parent: Context | None, in_body: bool
) -> tuple[Span, dict[str, Any]] | None:
    """Begin the span of a submission; return it with the headers that carry its context.

    None where OpenTelemetry's instrumentation has begun its span of this call just now.
    """
    headers, brought = dict(message["headers"]), extracted(message["headers"])
    current = trace.get_current_span().get_span_context()
    is_current = brought is not None and trace.get_current_span(brought).get_span_context().span_id == current.span_id
    if is_current and is_instrumented(signals.before_task_publish):
        return None
    if current.is_valid:
        # A retry has the headers of the attempt that publishes it, and so the context from before that attempt.
        parent = None if in_body else brought
    elif parent is None:
        parent = brought
    attributes = _attributes(headers, name, message.get("routing_key"), operation)
    span = _tracer().start_span(f"{operation} {name}", parent, kind=SpanKind.PRODUCER, attributes=attributes)
    for field in carried(headers):
        del headers[field]
    propagate.inject(headers, trace.set_span_in_context(span))
    return span, headers


def running(admission: Admission, body: Callable[..., Returned], *args: Any) -> Returned:
    """Call Celery's trace function for a body, within the span of its run. In the pool's process or thread.

    `args`: as Celery gives them: the task's name, the job's id, the headers, and the rest.
    """
    name, job, headers, *rest = args
    span = guarded(_begin_run, admission, name, job, headers)
    if span is None:
        return body(*args)
    try:
        with trace.use_span(span, record_exception=False, set_status_on_exception=False):
            if is_instrumented(signals.task_prerun):
                # Its span reads its parent from the headers, of which a pool of threads has no copy.
                headers = dict(headers)
                guarded(propagate.inject, headers)
            returned = body(name, job, headers, *rest)
        if returned[0]:
            guarded(_note_exception, span, returned[1])
        return returned
    except BaseException as error:
        guarded(_failed, span, error)
        raise
    finally:
        guarded(span.end)


def _begin_run(admission: Admission, name: str, job: str, headers: Headers) -> Span:
    """Begin the span of a body's run, and make those of the time before it."""
    began = time.time_ns()
    parent = extracted(headers)
    queue = (headers.get("delivery_info") or {}).get("routing_key")
    attributes = {
        **_attributes({**headers, "id": job}, name, queue, "process"),
        **{f"{SCOPE}.request.{resource}": amount for resource, amount in admission.request.items()},
        f"{SCOPE}.worker": admission.worker,
        f"{SCOPE}.attempt": admission.attempt,
    }
    kind = SpanKind.INTERNAL if is_instrumented(signals.task_prerun) else SpanKind.CONSUMER
    span = _tracer().start_span(f"run {name}", parent, kind=kind, attributes=attributes, start_time=began)
    if span.is_recording():
        guarded(_steps_before, admission, headers, parent or trace.set_span_in_context(span), began)
    return span


def _steps_before(admission: Admission, headers: Headers, parent: Context, began: int) -> None:
    """Make the spans of the time before a body began, where their starts are known."""
    tracer = _tracer()
    attempt: dict[str, Any] = {f"{SCOPE}.attempt": admission.attempt}
    admitted = min(admission.admitted_ns, began)
    since = _waits_since(headers)
    if since is not None:
        tracer.start_span("waiting", parent, attributes=attempt, start_time=min(since, admitted)).end(admitted)
    attributes = {**attempt, f"{SCOPE}.worker": admission.worker}
    span = tracer.start_span("admitted", parent, attributes=attributes, start_time=admitted)
    span.add_event("claimed", timestamp=max(admitted, min(admission.claimed_ns, began)))
    span.end(began)


def _waits_since(headers: Headers) -> int | None:
    """Return when a job began to wait, in nanoseconds: at its acceptance, or at the time that it was put off to.

    None where the message does not tell: it is from a sender without traces, or another attempt had it before.
    """
    carried_request = headers.get(HEADER)
    capacity = carried_request if isinstance(carried_request, Mapping) else {}
    accepted = headers.get(ACCEPTED)
    # An exporter writes no time before the epoch, and may drop all spans of its batch.
    if type(accepted) is not int or accepted < 0 or (headers.get("delivery_info") or {}).get("redelivered"):
        return None
    try:
        due = datetime.fromisoformat(str(capacity.get(ETA))).timestamp()
    except (ValueError, OverflowError):
        due = 0.0
    return max(accepted, round(due * 1000)) * _MS


def ended(headers: Headers, admission: Admission, outcome: Outcome, error: str | None, times: tuple[int, int]) -> None:
    """Make the span `result` of an attempt, from the end of its body until the deciding store has it.

    `headers`: those that carry the context. `times`: start and end in nanoseconds.
    """
    parent = extracted(headers)
    if parent is None:
        return
    attributes: dict[str, Any] = {
        f"{SCOPE}.attempt": admission.attempt,
        f"{SCOPE}.worker": admission.worker,
        f"{SCOPE}.outcome": str(outcome),
    }
    span = _tracer().start_span("result", parent, attributes=attributes, start_time=times[0])
    if span.is_recording() and outcome not in GOOD:
        first = (error or "").strip().partition("\n")[0]
        span.set_status(Status(StatusCode.ERROR, hidden_lines(first) or None))
    span.end(times[1])


def _attributes(headers: Headers, name: str, queue: Any, operation: str) -> dict[str, Any]:
    """Return the attributes of a message, by the conventions for messaging and by names of the platform's."""
    carried_request = headers.get(HEADER)
    capacity = carried_request if isinstance(carried_request, Mapping) else {}
    attributes: dict[str, Any] = {
        "messaging.system": "celery",
        "messaging.operation.name": operation,
        "messaging.operation.type": operation,
        "messaging.destination.name": queue,
        "messaging.message.id": headers.get("id"),
        f"{SCOPE}.task": name,
        f"{SCOPE}.tenant": capacity.get(TENANT, DEFAULT_TENANT),
    }
    try:
        request = Request.from_shape(str(capacity.get("shape"))).to_people() if "shape" in capacity else {}
    except PlatformError:
        request = {}
    attributes |= {f"{SCOPE}.request.{resource}": amount for resource, amount in request.items()}
    # A header of a foreign sender may have a value of any type.
    return {name: value for name, value in attributes.items() if isinstance(value, (str, int, float))}


def _note_exception(span: Span, info: Any) -> None:
    """Note the exception with which a body ended. A retry and an ignored task are no errors."""
    error = getattr(info, "exception", info)
    if isinstance(error, ExceptionWithTraceback):
        error = error.exc
    if isinstance(error, Retry):
        span.set_attribute(f"{SCOPE}.outcome", str(Outcome.RETRIED))
        if isinstance(error.exc, BaseException):
            _add_exception(span, error.exc, "")
    elif not isinstance(error, Ignore):
        _failed(span, error, str(getattr(info, "traceback", "")))


def _failed(span: Span, error: BaseException, traceback: str = "") -> None:
    _add_exception(span, error, traceback)
    span.set_status(Status(StatusCode.ERROR, f"{type(error).__name__}: {_text_of(error)}"))


def _text_of(error: BaseException) -> str:
    """Return the text of an exception without secrets; "" where a task's own exception cannot make one."""
    try:
        return hidden_lines(str(error))
    except Exception:
        return ""


def _add_exception(span: Span, error: BaseException, traceback: str) -> None:
    """Add the event of an exception, without the lines that have secrets in them."""
    kind = type(error)
    attributes = {
        "exception.type": kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}",
        "exception.message": _text_of(error),
        **({"exception.stacktrace": hidden_lines(traceback)} if traceback else {}),
    }
    span.add_event("exception", attributes)


def flush(within: float) -> None:
    """Export the spans of this process, and wait no longer than `within` seconds for that.

    The SDK's processors know the limit, and do not keep to it: they would wait for a collector that does not answer.
    """
    export = getattr(trace.get_tracer_provider(), "force_flush", None)
    if export is not None:
        arguments = (export, round(within * 1000))
        exporting = threading.Thread(target=guarded, args=arguments, name="last spans", daemon=True)
        exporting.start()
        exporting.join(within)
