"""The ways out of a request that no hook of Celery's reports."""

from __future__ import annotations

from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

from routing.message import Tag
from routing.outbox import Outbox
from workers import attempts
from workers.requests import request_class
from workers.tracing import TracedPool


class Backend:
    """Takes a failure as `workers.results` does: it goes into the outbox of the attempt."""

    def mark_as_failure(self, job: str, error: BaseException, **_: Any) -> None:
        attempt = attempts.current()
        assert attempt is not None and attempt.deferred
        attempt.outbox.results.append({"result": job, "error": repr(error)})


class CeleryRequest:
    """As little of Celery's request as is needed to give one to a pool."""

    id = "job"
    _context = None
    task = SimpleNamespace(backend=Backend())
    future: Future[None]

    def __init__(self, message: Any) -> None:
        self._request_dict: dict[str, Any] = {}

    def execute_using_pool(self, pool: Any, **options: Any) -> Any:
        assert isinstance(pool, TracedPool)
        return SimpleNamespace(f=self.future)


def given_to_a_threads_pool() -> tuple[Future[None], list[tuple[str, str, str, str | None, int]]]:
    """The future of a job that a threads pool runs, and the ends that were reported of it, each with the number of
    results that go with it."""
    ends: list[tuple[str, str, str, str | None, int]] = []
    future: Future[None] = Future()

    def end_job(job: str, token: str, outcome: str, error: str | None, outbox: Outbox, on_lost: Any) -> bool:
        ends.append((job, token, outcome, error, len(outbox.results)))
        return True

    request: Any = request_class(CeleryRequest, "life", end_job, lambda: False)(SimpleNamespace(delivery_tag="job:1.2"))
    request.future = future
    assert request.tag == Tag("job", 1, 2)
    request.execute_using_pool(None)
    return future, ends


def test_a_trace_that_raises_in_a_thread_ends_the_job() -> None:
    future, ends = given_to_a_threads_pool()
    future.set_exception(ConnectionError("the result cannot be stored"))
    assert ends == [("job", "1.2", "failed", "ConnectionError('the result cannot be stored')", 1)]


def test_a_trace_that_returned_is_left_to_celery_s_hooks() -> None:
    future, ends = given_to_a_threads_pool()
    future.set_result(None)
    assert ends == []


def test_a_job_that_a_stopping_threads_pool_never_began_goes_back() -> None:
    future, ends = given_to_a_threads_pool()
    future.cancel()
    assert ends == [("job", "1.2", "handed_back", "not started", 0)]
