"""Traces of jobs: one trace over the submitter, the worker and the jobs that a body submits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from celery import chain, chord
from opentelemetry import trace

from celery_capacity.routing.config.embedded import Pair
from celery_capacity.routing.model.message import decode
from tests.fixtures.jobs.submitting import Submitter, standing_platform
from tests.fixtures.processes.platforms import Platform
from tests.fixtures.waiting import until
from tests.tasks.spanned import SPANS, dies, fails, inner, outer, retries, writing_to

Span = dict[str, Any]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("traces") / "spans"


@pytest.fixture(scope="module")
def platform(server_pair: Pair, file: Path) -> Iterator[Platform]:
    """Yield one worker `a` with traces, and settings of a submitter with traces."""
    with standing_platform(server_pair, file.parent, "tests.tasks.spanned") as running:
        running.environment[SPANS] = str(file)
        running.worker("a", 1, slots=2, PLATFORM_TRACES="on")
        running.settings = replace(running.settings, traces=True)
        yield running


@pytest.fixture(autouse=True)
def provider(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the spans of the test's process written into the file, too."""
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", writing_to(str(file)))


def spans_of(file: Path, trace_id: str, results: int) -> list[Span]:
    """Return the spans of a trace, once it has so many results of attempts; in the order of their starts."""

    def spans() -> list[Span]:
        lines = file.read_text(encoding="utf-8").split("\n")[:-1]
        written = [json.loads(line) for line in lines]
        mine = [span for span in written if span["context"]["trace_id"] == trace_id]
        done = sum(span["name"] == "result" for span in mine)
        return sorted(mine, key=lambda span: str(span["start_time"])) if done >= results else []

    return until(spans, "the results of the trace")


def named(spans: list[Span], name: str, parent: Span | None = None) -> Span:
    """Return the span of a name, below this parent."""
    (span,) = [
        span
        for span in spans
        if span["name"] == name and (parent is None or span["parent_id"] == parent["context"]["span_id"])
    ]
    return span


def sent(submitter: Submitter, task: Any, *args: Any, **options: Any) -> tuple[str, str]:
    """Submit a job within a span of the caller's; return its id and that of the trace."""
    with trace.get_tracer("test").start_as_current_span("caller") as span:
        job = submitter.send(task.name, *args, **options)
    return job, f"0x{span.get_span_context().trace_id:032x}"


def test_trace_has_all_steps_of_a_job_and_of_the_job_it_submits(
    platform: Platform, submitter: Submitter, file: Path
) -> None:
    job, trace_id = sent(submitter, outer, 3, cpus=0.5, memory="1MiB")
    child = submitter.value(job)
    assert submitter.value(child) == 3
    spans = spans_of(file, trace_id, results=2)

    send = named(spans, f"send {outer.name}", named(spans, "caller"))
    steps = [span for span in spans if span["parent_id"] == send["context"]["span_id"]]
    assert [span["name"] for span in steps] == ["waiting", "admitted", f"run {outer.name}", "result"]
    waiting, admitted, run, result = steps
    assert (waiting["end_time"], admitted["end_time"]) == (admitted["start_time"], run["start_time"])
    assert (send["kind"], run["kind"]) == ("SpanKind.PRODUCER", "SpanKind.CONSUMER")
    assert run["attributes"] == {
        "messaging.system": "celery",
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.destination.name": "celery",
        "messaging.message.id": job,
        "celery_capacity.task": outer.name,
        "celery_capacity.tenant": "default",
        "celery_capacity.request.cpus": 0.5,
        "celery_capacity.request.memory": 2**20,
        "celery_capacity.request.slots": 1,
        "celery_capacity.worker": "a",
        "celery_capacity.attempt": 1,
    }
    assert send["attributes"].items() >= {"messaging.operation.name": "send", "messaging.message.id": job}.items()
    assert result["attributes"]["celery_capacity.outcome"] == "succeeded"

    below = named(spans, f"send {inner.name}", named(spans, "own", run))
    for name in ("waiting", "admitted", f"run {inner.name}", "result"):
        named(spans, name, below)
    assert {span["status"]["status_code"] for span in spans} == {"UNSET"}


def test_failed_job_has_the_exception_without_secrets(platform: Platform, submitter: Submitter, file: Path) -> None:
    job, trace_id = sent(submitter, fails)
    submitter.ended(job)
    spans = spans_of(file, trace_id, results=1)
    run, result = named(spans, f"run {fails.name}"), named(spans, "result")
    assert [span["status"]["status_code"] for span in (run, result)] == ["ERROR", "ERROR"]
    (event,) = run["events"]
    assert (event["name"], event["attributes"]["exception.type"]) == ("exception", "ValueError")
    assert result["attributes"]["celery_capacity.outcome"] == "failed"
    assert "hunter2" not in json.dumps(spans)


def test_each_attempt_of_a_retried_job_has_its_spans_in_one_trace(
    platform: Platform, submitter: Submitter, file: Path
) -> None:
    job, trace_id = sent(submitter, retries)
    assert submitter.value(job) == 1
    spans = spans_of(file, trace_id, results=2)
    first = named(spans, f"send {retries.name}", named(spans, "caller"))
    run = named(spans, f"run {retries.name}", first)
    assert (run["status"]["status_code"], run["attributes"]["celery_capacity.outcome"]) == ("UNSET", "retried")
    second = named(spans, f"send {retries.name}", run)
    assert named(spans, f"run {retries.name}", second)["attributes"]["celery_capacity.attempt"] == 2
    assert named(spans, "waiting", second)["attributes"]["celery_capacity.attempt"] == 2


def test_many_jobs_of_one_call_have_their_spans_in_one_trace(
    platform: Platform, submitter: Submitter, file: Path
) -> None:
    with trace.get_tracer("test").start_as_current_span("caller") as span:
        jobs = submitter.app.submit_many(inner, [(1,), (2,), (3,)], cpus=0.5)
    assert [job.get(timeout=60) for job in jobs] == [1, 2, 3]
    spans = spans_of(file, f"0x{span.get_span_context().trace_id:032x}", results=3)
    names = [span["name"] for span in spans]
    assert names.count(f"create {inner.name}") == names.count(f"run {inner.name}") == 3


def test_message_keeps_the_context_that_its_caller_names(platform: Platform, submitter: Submitter, file: Path) -> None:
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    headers = {"traceparent": f"00-{trace_id}-b7ad6b7169203331-01", "tracestate": 7}
    job = submitter.send(inner.name, 1, headers=headers)
    submitter.ended(job)
    spans = spans_of(file, f"0x{trace_id}", results=1)
    assert named(spans, f"send {inner.name}")["parent_id"] == "0xb7ad6b7169203331"
    assert decode(bytes(submitter.row(job).message))["headers"]["traceparent"].startswith(f"00-{trace_id}")


def test_result_tells_of_a_process_that_died_with_the_body(
    platform: Platform, submitter: Submitter, file: Path
) -> None:
    job, trace_id = sent(submitter, dies)
    assert submitter.value(job) == 2
    spans = spans_of(file, trace_id, results=2)
    outcomes = [span["attributes"]["celery_capacity.outcome"] for span in spans if span["name"] == "result"]
    assert outcomes == ["lost", "succeeded"]
    assert named(spans, f"run {dies.name}")["attributes"]["celery_capacity.attempt"] == 2


def test_chain_and_chord_stay_in_one_trace(platform: Platform, submitter: Submitter, file: Path) -> None:
    with trace.get_tracer("test").start_as_current_span("caller") as span:
        result = chain(inner.si(0), chord([inner.si(1), inner.si(2)], inner.si(3))).apply_async()
    assert result.get(timeout=60) == 3
    spans = spans_of(file, f"0x{span.get_span_context().trace_id:032x}", results=4)
    assert sum(span["name"] == f"run {inner.name}" for span in spans) == 4
