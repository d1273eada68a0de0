"""Spans of submissions and bodies: their parents, what they say of errors, and the instrumentation beside them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from billiard.exceptions import SoftTimeLimitExceeded
from celery import signals
from celery.app.task import Context
from celery.exceptions import Ignore, Reject, Retry
from opentelemetry import trace
from opentelemetry.instrumentation.celery import CeleryInstrumentor
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from celery_capacity.routing.ledger.replies import Ended
from celery_capacity.routing.model.message import ACCEPTED, ETA, HEADER, Tag
from celery_capacity.routing.model.request import Request
from celery_capacity.routing.model.states import Outcome
from celery_capacity.routing.model.token import Token
from celery_capacity.workers.process.holdings import Holding, Holdings
from celery_capacity.workers.traces.guard import guarded
from celery_capacity.workers.traces.spans import Admission, running, sending
from celery_capacity.workers.traces.worker import WorkerTraces
from tests.tasks.spanned import inner

TRACE = "0af7651916cd43dd8448eb211c80319c"
CALLER = f"00-{TRACE}-b7ad6b7169203331-01"
#: Nanoseconds of a second.
SECOND = 1_000_000_000


@dataclass(eq=False)
class RunningTask:
    """Stand-in for a task that runs, as far as listeners to its signals look at it."""

    name: str
    request: Context


@pytest.fixture(autouse=True)
def exporter(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    return exporter


@pytest.fixture
def instrumented() -> Iterator[None]:
    """Have OpenTelemetry's instrumentation of Celery beside the platform's spans."""
    instrumentor: Any = CeleryInstrumentor
    instrumentor().instrument()
    yield
    instrumentor().uninstrument()


class BrokenProcessor(SpanProcessor):
    """Processor of an operator that fails at the start or at the end of each span."""

    def __init__(self, moment: str) -> None:
        self._moment = moment

    def on_start(self, span: Any, parent_context: Any = None) -> None:
        if self._moment == "start":
            raise RuntimeError("no spans today")

    def on_end(self, span: Any) -> None:
        if self._moment == "end":
            raise RuntimeError("no spans today")


@pytest.fixture(params=["start", "end"])
def broken(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(BrokenProcessor(request.param))
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)


class Mute(Exception):
    """Error of a task whose text cannot be made."""

    def __str__(self) -> str:
        raise ValueError("no text")


def message(**headers: Any) -> dict[str, Any]:
    return {"headers": {"id": "job-1", "task": "render", **headers}, "routing_key": "celery"}


def admission(**changed: Any) -> Admission:
    now = time.time_ns()
    return Admission("a", 1, {"cpus": 2}, now - 2 * SECOND, now - SECOND)._replace(**changed)


def run(body: Callable[..., Any] = lambda *_: (0, 7, 0.1), **headers: Any) -> Any:
    return running(admission(), body, "render", "job-1", headers, b"[]", "application/json", "utf-8")


def by_name(exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    return {span.name: span for span in exporter.get_finished_spans()}


def id_of(span: ReadableSpan) -> int:
    assert span.context is not None
    return int(span.context.span_id)


def parent_of(span: ReadableSpan) -> int | None:
    return span.parent and span.parent.span_id


def test_submission_writes_its_context_and_leaves_the_callers_headers(exporter: InMemorySpanExporter) -> None:
    original = message(traceparent=CALLER)
    with sending(original, "render", "send", None, in_body=False) as sent:
        carried = sent["headers"]["traceparent"]
    span = by_name(exporter)["send render"]
    assert carried == f"00-{TRACE}-{id_of(span):016x}-01"
    assert original == message(traceparent=CALLER)
    assert (parent_of(span), span.kind) == (0xB7AD6B7169203331, SpanKind.PRODUCER)


def test_submission_of_a_body_continues_its_run(exporter: InMemorySpanExporter) -> None:
    inherited = message(traceparent=CALLER, tracestate="a=1")
    with (
        trace.get_tracer("test").start_as_current_span("run") as current,
        sending(inherited, "render", "send", None, in_body=True) as sent,
    ):
        assert "tracestate" not in sent["headers"]
    assert parent_of(by_name(exporter)["send render"]) == current.get_span_context().span_id


def test_refused_submission_is_an_error_without_secrets(exporter: InMemorySpanExporter) -> None:
    with pytest.raises(ValueError, match="hunter2"), sending(message(), "render", "send", None, in_body=False):
        raise ValueError("no: password=hunter2")
    span = by_name(exporter)["send render"]
    assert span.status.status_code is StatusCode.ERROR
    assert [event.name for event in span.events] == ["exception"]
    assert "hunter2" not in span.to_json()


def test_run_without_a_context_is_the_root_of_the_time_before_it(exporter: InMemorySpanExporter) -> None:
    headers: Any = {"traceparent": 7, HEADER: {"shape": "no shape"}}
    assert run(**headers) == (0, 7, 0.1)
    exported = by_name(exporter)
    assert exported.keys() == {"run render", "admitted"}
    assert parent_of(exported["run render"]) is None
    assert parent_of(exported["admitted"]) == id_of(exported["run render"])
    assert [event.name for event in exported["admitted"].events] == ["claimed"]


@pytest.mark.parametrize("redelivered", [False, True])
def test_wait_begins_at_the_time_that_the_job_was_put_off_to(exporter: InMemorySpanExporter, redelivered: bool) -> None:
    accepted = time.time_ns() // 1_000_000 - 60_000
    due = "2026-12-01T00:00:00+00:00" if redelivered else "2001-01-01T00:00:00+00:00"
    headers: Any = {ACCEPTED: accepted, HEADER: {ETA: due}, "delivery_info": {"redelivered": redelivered}}
    run(traceparent=CALLER, **headers)
    waiting = by_name(exporter).get("waiting")
    assert (waiting is None) == redelivered
    assert waiting is None or waiting.start_time == accepted * 1_000_000


@pytest.mark.parametrize(
    ("error", "status", "events"),
    [
        (ValueError("password=hunter2"), StatusCode.ERROR, 1),
        (Reject("unwanted"), StatusCode.ERROR, 1),
        (Retry("later", exc=OSError("busy")), StatusCode.UNSET, 1),
        (Ignore(), StatusCode.UNSET, 0),
    ],
    ids=["failure", "reject", "retry", "ignore"],
)
def test_run_tells_how_its_body_ended(
    exporter: InMemorySpanExporter, error: Exception, status: StatusCode, events: int
) -> None:
    ended = (1, SimpleNamespace(exception=error, traceback="in render, password=hunter2"), 0.1)
    assert run(lambda *_: ended, traceparent=CALLER) == ended
    span = by_name(exporter)["run render"]
    assert (span.status.status_code, len(span.events)) == (status, events)
    assert "hunter2" not in span.to_json()


def test_run_that_is_broken_off_is_an_error(exporter: InMemorySpanExporter) -> None:
    def body(*_: Any) -> Any:
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        run(body, traceparent=CALLER)
    assert by_name(exporter)["run render"].status.status_code is StatusCode.ERROR


def test_run_keeps_the_end_of_a_body_whose_error_has_no_text(exporter: InMemorySpanExporter) -> None:
    ended = (1, SimpleNamespace(exception=Mute(), traceback=""), 0.1)
    assert run(lambda *_: ended, traceparent=CALLER) == ended
    assert by_name(exporter)["run render"].status.status_code is StatusCode.ERROR


def test_body_runs_once_where_spans_fail(broken: None) -> None:
    runs: list[str] = []

    def body(name: str, *_: Any) -> Any:
        runs.append(name)
        return 0, 7, 0.1

    assert (run(body, traceparent=CALLER), runs) == ((0, 7, 0.1), ["render"])


def test_submission_goes_on_where_spans_fail(broken: None) -> None:
    sent: list[Any] = []
    with sending(message(), "render", "send", None, in_body=False) as traced:
        sent.append(traced["headers"]["id"])
    assert sent == ["job-1"]


def test_end_is_stored_where_spans_fail(broken: None) -> None:
    holdings = Holdings({"cpus": 2000})
    holdings.add(Holding("job-1", Token(1, 1), Request.of({"cpus": 1000}), "nonce"))
    traces = WorkerTraces("a", holdings, lambda: time.time_ns() // 1_000_000)

    def body(*_: Any) -> Any:
        return 0, 7, 0.1

    call = ("render", "job-1", {"traceparent": CALLER}, b"[]", "application/json", "utf-8")
    assert traces.around(str(Tag("job-1", Token(1, 1))), body, call)(*call) == (0, 7, 0.1)
    traces.over("job-1", Token(1, 1))
    traces.stored(Ended("job-1", Token(1, 1), Outcome.SUCCEEDED))
    assert traces.context_of("job-1", Token(1, 1)) is None


def test_soft_time_limit_that_comes_within_a_span_call_is_raised() -> None:
    def interrupted() -> None:
        raise SoftTimeLimitExceeded

    with pytest.raises(SoftTimeLimitExceeded):
        guarded(interrupted)


def test_wait_is_not_told_from_a_time_before_the_epoch(exporter: InMemorySpanExporter) -> None:
    headers: Any = {ACCEPTED: -1}
    run(traceparent=CALLER, **headers)
    assert "waiting" not in by_name(exporter)


def test_instrumentation_has_the_spans_of_the_call_and_of_the_body(
    exporter: InMemorySpanExporter, instrumented: None
) -> None:
    headers = {**message()["headers"], "task": inner.name}
    signals.before_task_publish.send(sender=inner.name, body=[], headers=headers, exchange="", routing_key="celery")
    with sending({"headers": headers, "routing_key": "celery"}, inner.name, "send", None, in_body=False) as sent:
        assert sent["headers"]["traceparent"] == headers["traceparent"]
    signals.after_task_publish.send(sender=inner.name, body=[], headers=headers, exchange="", routing_key="celery")

    def body(name: str, job: str, request: Any, *_: Any) -> Any:
        task = RunningTask(name, Context(request))
        signals.task_prerun.send(sender=task, task_id=job, task=task)
        signals.task_postrun.send(sender=task, task_id=job, task=task)
        return 0, "7", 0.1

    running(admission(), body, inner.name, "job-1", headers, b"[]", "application/json", "utf-8")
    exported = by_name(exporter)
    call, mine, theirs = (exported[f"{name}{inner.name}"] for name in ("apply_async/", "run ", "run/"))
    assert (call.kind, mine.kind, theirs.kind) == (SpanKind.PRODUCER, SpanKind.INTERNAL, SpanKind.CONSUMER)
    assert (parent_of(mine), parent_of(theirs)) == (id_of(call), id_of(mine))
    assert f"send {inner.name}" not in exported
