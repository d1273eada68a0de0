"""Tasks with spans, and a provider that writes the spans of each process into one file, a JSON object a line."""

from __future__ import annotations

import os
from typing import Any, Final

from celery import shared_task
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor

#: Environment variable that names the file.
SPANS: Final = "TEST_SPANS"


def writing_to(file: str) -> TracerProvider:
    """Return a provider that appends spans to a file."""
    provider = TracerProvider(shutdown_on_exit=False)
    out = open(file, "a", encoding="utf-8")  # noqa: SIM115  open as long as the process
    exporter = ConsoleSpanExporter(out=out, formatter=lambda span: f"{span.to_json(indent=None)}\n")
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return provider


if os.environ.get(SPANS):
    trace.set_tracer_provider(writing_to(os.environ[SPANS]))


@shared_task
def inner(x: int) -> int:
    return x


@shared_task
def outer(x: int) -> str:
    """Make a span of its own, and submit a job within it."""
    with trace.get_tracer(__name__).start_as_current_span("own"):
        return str(inner.apply_async((x,), cpus=0.5).id)


@shared_task
def fails() -> None:
    raise ValueError("as told, with password=hunter2")


@shared_task(bind=True)
def retries(self: Any) -> int:
    if self.request.retries == 0:
        raise self.retry(exc=OSError("not yet"), countdown=0)
    return int(self.request.retries)


@shared_task(bind=True)
def dies(self: Any) -> int:
    """End the process of the body at the first attempt."""
    if self.request.attempt == 1:
        os._exit(9)
    return int(self.request.attempt)
