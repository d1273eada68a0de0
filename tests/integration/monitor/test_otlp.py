"""Spans leave submitters and workers by OTLP, with the set-up that the documents give, and no job waits for them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from celery_capacity.routing.config.embedded import Pair
from tests.fixtures.jobs.submitting import Submitter, standing_platform
from tests.fixtures.processes.platforms import ROOT, Platform, Pool, Process
from tests.fixtures.servers.collector import Collector, collecting

#: The first module of the how-to.
HOW_TO = (ROOT / "docs" / "how-to" / "traces.md").read_text(encoding="utf-8")
TRACING = re.search(r"```python\n(# tracing\.py\n.*?)```", HOW_TO, re.DOTALL)
FARM = """\
import tracing
from celery import shared_task


@shared_task
def thumbnail(scene):
    return scene


@shared_task
def render(scene):
    return thumbnail.delay(scene).id
"""
SUBMIT = """\
from celery_capacity import create_app

app = create_app(include=["farm"])

from opentelemetry import trace

from farm import render

with trace.get_tracer("web").start_as_current_span("POST /render"):
    job = render.delay("lion")
print(job.get(timeout=120), flush=True)
"""
RENDER, THUMBNAIL = "farm.render", "farm.thumbnail"
#: Seconds until a collector is given up, and milliseconds between exports: in a test that holds it, none is given up.
NEVER, OFTEN = "600", "100"


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        yield collector


@pytest.fixture
def platform(server_pair: Pair, tmp_path: Path, collector: Collector) -> Iterator[Platform]:
    """Yield a platform whose processes export their spans to the collector."""
    assert TRACING is not None
    for name, text in (("tracing", TRACING[1]), ("farm", FARM), ("submit", SUBMIT)):
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    with standing_platform(server_pair, tmp_path, "farm") as running:
        running.environment |= {
            "PYTHONPATH": os.pathsep.join([str(tmp_path), running.environment.get("PYTHONPATH", str(ROOT))]),
            "PLATFORM_TRACES": "on",
            "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
            "OTEL_EXPORTER_OTLP_TIMEOUT": NEVER,
            "OTEL_BSP_SCHEDULE_DELAY": OFTEN,
        }
        yield running


def worker_of(platform: Platform, pool: Pool, *arguments: str) -> Process:
    return platform.worker("a", 1, pool, slots=1, arguments=arguments, OTEL_SERVICE_NAME="render-farm")


def submitting(platform: Platform) -> subprocess.Popen[str]:
    """Start a program that submits a job within a span of its own, and prints the result."""
    environment = {**platform.environment, "PLATFORM_IMPORTS": "", "OTEL_SERVICE_NAME": "web"}
    return subprocess.Popen(
        [sys.executable, "submit.py"], cwd=platform.folder, env=environment, stdout=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_collector_gets_one_trace_of_a_submitter_and_a_worker(
    platform: Platform, submitter: Submitter, collector: Collector, pool: Pool
) -> None:
    worker_of(platform, pool)
    with submitting(platform) as program:
        child, _ = program.communicate(timeout=240)
    assert program.returncode == 0
    assert submitter.value(child.strip()) == "lion"
    collector.wait_for("result", "result")

    request = collector.named("POST /render")
    assert (request.parent, request.service) == ("", "web")
    assert {span.trace for span in collector.spans} == {request.trace}
    send = collector.named(f"send {RENDER}", request)
    assert send.service == "web"
    steps = ["waiting", "admitted", f"run {RENDER}", "result"]
    assert {collector.named(step, send).service for step in steps} == {"render-farm"}
    run = collector.named(f"run {RENDER}", send)
    assert (run.attributes["celery_capacity.worker"], run.attributes["messaging.message.id"]) == (
        "a",
        send.attributes["messaging.message.id"],
    )
    below = collector.named(f"send {THUMBNAIL}", run)
    for step in ("waiting", "admitted", f"run {THUMBNAIL}", "result"):
        collector.named(step, below)
    assert len(collector.spans) == 11


@pytest.mark.parametrize(("pool", "arguments"), [("prefork", ["--max-tasks-per-child", "1"]), ("threads", [])])
def test_jobs_do_not_wait_for_a_collector_that_does_not_answer(
    platform: Platform, submitter: Submitter, collector: Collector, pool: Pool, arguments: list[str]
) -> None:
    collector.hold()
    worker_of(platform, pool, *arguments)
    program = submitting(platform)
    assert program.stdout is not None
    child = program.stdout.readline().strip()
    # Each runs in a process of its own where the pool is of processes.
    jobs = [submitter.send(THUMBNAIL, scene) for scene in ("tiger", "heron", "whale")]
    assert [submitter.value(job) for job in (child, *jobs)] == ["lion", "tiger", "heron", "whale"]
    assert (collector.came > 0, collector.answered) == (True, 0)
    collector.let_go()
    assert program.wait(timeout=240) == 0
    program.stdout.close()


def test_jobs_end_and_programs_exit_without_a_collector(
    platform: Platform, submitter: Submitter, collector: Collector
) -> None:
    gone = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_EXPORTER_OTLP_TIMEOUT": "1"}
    platform.environment |= gone
    worker = worker_of(platform, "prefork", "--max-tasks-per-child", "1")
    with submitting(platform) as program:
        child, _ = program.communicate(timeout=240)
    assert program.returncode == 0
    assert submitter.value(child.strip()) == "lion"
    assert worker.stop() == 0
    assert collector.came == 0
