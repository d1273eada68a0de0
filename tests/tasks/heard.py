"""Tasks for tests of remote control, events and signals, and a file of all signals that this process hears.

The module is imported by a worker of the platform, and by a worker of plain Celery (`tests.tasks.plain`). Both hear the
same signals.
"""

from __future__ import annotations

import json
import os
from typing import Any

from celery import Task, shared_task, signals
from celery.exceptions import Reject

from tests.fixtures.tasks import held_at

#: Environment variable that names the file.
HEARD = "TEST_HEARD"
#: Signals about jobs, and about the worker's life.
OF_JOBS = (
    *("before_task_publish", "after_task_publish", "task_received", "task_prerun", "task_postrun", "task_success"),
    *("task_retry", "task_failure", "task_internal_error", "task_revoked", "task_unknown", "task_rejected"),
)
OF_WORKERS = (
    *("celeryd_init", "celeryd_after_setup", "worker_init", "worker_before_create_process", "worker_process_init"),
    *("worker_ready", "worker_shutting_down", "worker_process_shutdown", "worker_shutdown", "heartbeat_sent"),
)


def _job_of(sender: Any, given: dict[str, Any]) -> str | None:
    """Return the id of the job that a signal is about; for some signals only the running task has it."""
    running = getattr(getattr(sender, "request", None), "id", None)
    for job in (given.get("task_id"), given.get("id"), getattr(given.get("request"), "id", None), running):
        if job:
            return str(job)
    headers = given.get("headers")
    return str(headers["id"]) if isinstance(headers, dict) and "id" in headers else None


def _listen(name: str, file: str) -> None:
    def heard(sender: Any = None, **given: Any) -> None:
        given.pop("signal")
        record = {
            "signal": name,
            "job": _job_of(sender, given),
            "sender": getattr(sender, "name", None) or (sender if isinstance(sender, str) else type(sender).__name__),
            "given": sorted(given),
            "expired": given.get("expired"),
            "terminated": given.get("terminated"),
        }
        descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(descriptor, (json.dumps(record) + "\n").encode())
        os.close(descriptor)

    getattr(signals, name).connect(heard, weak=False)


if os.environ.get(HEARD):
    for _name in (*OF_JOBS, *OF_WORKERS):
        _listen(_name, os.environ[HEARD])


@shared_task
def done(x: int) -> int:
    return x


@shared_task
def fails() -> None:
    raise ValueError("as told")


class Clumsy(Task):
    """A task that fails once more when it hears of a failure."""

    def on_failure(self, exc: Exception, *_: Any) -> None:
        if not isinstance(exc, LookupError):
            raise LookupError("in the hook")


@shared_task(base=Clumsy)
def fails_twice() -> None:
    raise ValueError("in the body")


@shared_task
def rejects() -> None:
    raise Reject("unwanted", requeue=False)


@shared_task(bind=True)
def retries(self: Any) -> int:
    if self.request.retries == 0:
        raise self.retry(exc=ValueError("not yet"), countdown=0)
    return int(self.request.retries)


@shared_task(bind=True)
def replaced(self: Any) -> None:
    raise self.replace(done.s(7))


@shared_task(bind=True)
def retries_when_let_go(self: Any, gate: str) -> str:
    """Wait at the gate in the first attempt, which then retries."""
    if self.request.retries == 0:
        held_at(gate, self.request.id)
        raise self.retry(countdown=0)
    return "ran again"
