"""The ways out of a request that no hook of Celery's reports."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
from celery import signals
from celery.app.task import Context
from celery.exceptions import TaskRevokedError
from celery.utils.threads import LocalStack

from celery_capacity.routing.model.message import Tag
from celery_capacity.routing.model.outbox import Outbox
from celery_capacity.routing.model.token import Token
from celery_capacity.workers.execute.request import request_class
from celery_capacity.workers.execute.run_body import TracedPool
from celery_capacity.workers.process import attempts


class Backend:
    """Backend that takes a failure as `workers.results.backends` does: into the outbox of the attempt."""

    def mark_as_failure(self, job: str, error: BaseException, store_result: bool = True, **_: Any) -> None:
        attempt = attempts.current()
        assert attempt is not None and attempt.deferred
        if store_result:
            attempt.outbox.results.append({"result": job, "error": repr(error)})


class CeleryTask:
    """The least of Celery's task that these tests need."""

    def __init__(self) -> None:
        self.backend = Backend()
        self.request_stack: Any = LocalStack()


class CeleryRequest:
    """The least of Celery's request that a pool needs."""

    id = "job"
    _context = Context(id="job", args=(1,), kwargs={})
    task = CeleryTask()
    store_errors = True
    future: Future[None]

    def __init__(self, message: Any) -> None:
        self._request_dict: dict[str, Any] = {}
        self.events: list[tuple[str, dict[str, Any]]] = []

    def send_event(self, kind: str, **fields: Any) -> None:
        self.events.append((kind, fields))

    def execute_using_pool(self, pool: Any, **options: Any) -> Any:
        assert isinstance(pool, TracedPool)
        return SimpleNamespace(f=self.future)


class Given:
    """A job that was given to a threads pool.

    The object keeps the ends that were reported of the job, each with the number of results that go with it. `to_say`
    holds the calls that are left for the main loop.
    """

    def __init__(self) -> None:
        self.ends: list[tuple[str, Token, str, str | None, int]] = []
        self.to_say: list[Callable[[], None]] = []
        self.future: Future[None] = Future()
        kind = request_class(CeleryRequest, "life", self._end_job, lambda: False, self.to_say.append)
        self.request: Any = kind(SimpleNamespace(delivery_tag="job:1.2"))
        self.request.future = self.future
        assert self.request.tag == Tag("job", Token(1, 2))
        self.request.execute_using_pool(None)

    def _end_job(self, job: str, token: Token, outcome: str, error: str | None, outbox: Outbox, on_lost: Any) -> bool:
        self.ends.append((job, token, outcome, error, len(outbox.results)))
        return True


@pytest.mark.parametrize("errors_are_kept", [True, False])
def test_a_trace_that_raises_in_a_thread_ends_the_job(errors_are_kept: bool) -> None:
    job, heard = Given(), []
    job.request.store_errors = errors_are_kept

    def hear(sender: Any = None, **told: Any) -> None:
        heard.append((told["task_id"], repr(told["exception"]), told["args"], sender.request_stack.top.id))

    job.future.set_exception(ConnectionError("the result cannot be stored"))
    shown = "ConnectionError('the result cannot be stored')"
    assert job.ends == [("job", Token(1, 2), "failed", shown, 1 if errors_are_kept else 0)]
    signals.task_failure.connect(hear)
    try:
        (say,) = job.to_say
        say()
    finally:
        signals.task_failure.disconnect(hear)
    assert heard == [("job", shown, (1,), "job")]
    assert job.request.task.request_stack.top is None
    ((kind, fields),) = job.request.events
    assert (kind, fields["exception"]) == ("task-failed", shown)
    assert "cannot be stored" in fields["traceback"]


def test_a_trace_that_returned_is_left_to_celery_s_hooks() -> None:
    job = Given()
    job.future.set_result(None)
    assert (job.ends, job.to_say) == ([], [])


def test_a_job_that_a_stopping_threads_pool_never_began_goes_back() -> None:
    job = Given()
    job.future.cancel()
    assert job.ends == [("job", Token(1, 2), "handed_back", "not started", 0)]


def test_job_that_went_back_before_it_began_never_runs_here() -> None:
    """A drain hands back a job that waits for a free process. Celery gives it to the next free one all the same."""
    job = Given()
    job.request.hand_back()
    with pytest.raises(TaskRevokedError):
        job.request.execute_using_pool(None)
    assert job.ends == [("job", Token(1, 2), "handed_back", "not started", 0)]
