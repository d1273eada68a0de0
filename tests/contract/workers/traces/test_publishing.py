"""Processes without traces: they need no OpenTelemetry, and messages have no header of it."""

from __future__ import annotations

import subprocess
import sys

#: Uses all that off traces pass, in an interpreter without OpenTelemetry.
CODE = """
import importlib.abc, sys

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "opentelemetry":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
from celery_capacity import create_app
from celery_capacity.routing.config.settings import Settings
from celery_capacity.workers.app import signals
from celery_capacity.workers.execute import run_body, runtime
from celery_capacity.workers.traces import publishing, worker

message = {"headers": {"task": "render", "id": "job-1"}}
with publishing.sending(Settings(), [], message) as sent:
    assert sent is message and list(sent["headers"]) == ["task", "id"]
assert worker.of("life") is None and worker.injected() == {}
with worker.continuing({"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}):
    pass
worker.flush_traces()
assert "celery_capacity.workers.traces.spans" not in sys.modules
try:
    Settings.from_environ({"PLATFORM_TRACES": "on"})
except Exception as error:
    print(error)
"""


def test_process_without_traces_needs_no_opentelemetry() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "PLATFORM_TRACES='on' needs OpenTelemetry" in done.stdout
    assert "pip install 'celery-capacity[otel]'" in done.stdout
