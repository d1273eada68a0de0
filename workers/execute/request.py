"""Worker's request for a job: every way out of it ends the attempt.

Celery's hooks run in the worker's main process, where they see killed children too, or in a thread of the pool. Neither
may wait for a store. So everything that the hooks would store or publish is collected (`_speaking`), and goes with the
end.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Literal

from billiard.einfo import ExceptionInfo, ExceptionWithTraceback
from celery.exceptions import (
    Ignore,
    InvalidTaskError,
    Reject,
    Retry,
    TaskError,
    TaskRevokedError,
    Terminated,
    WorkerLostError,
)
from celery.platforms import signals as signal_numbers
from celery.utils.saferepr import saferepr
from celery.worker import state as worker_state

from celery_capacity.routing.errors import LeaseLost
from celery_capacity.routing.model.message import ETA, HEADER, Tag, parse_tag
from celery_capacity.routing.model.outbox import Outbox
from celery_capacity.routing.model.states import Outcome
from celery_capacity.routing.model.token import Token
from celery_capacity.workers.execute.gevent_pool import Killed, problem_of, was_killed
from celery_capacity.workers.execute.outcome_check import Ambiguous
from celery_capacity.workers.execute.pool import abandon_bodies
from celery_capacity.workers.execute.run_body import TracedPool, unpacked
from celery_capacity.workers.process.attempts import Attempt, held
from celery_capacity.workers.results.events import allocation, raised, request_of, signal_failure

logger = logging.getLogger(__name__)

#: Characters of an exception's text that are kept.
ERROR_LENGTH = 4000

#: Error of an attempt that a drain broke off.
DRAINED = "the worker was drained"

#: Set by the worker's runtime: (job, token, outcome, error, outbox, on_lost) -> True if this was the first end.
EndJob = Callable[[str, Token, Outcome | Ambiguous, str | None, Outbox, Callable[[], None] | None], bool]


class JobRequest:
    """Mixin for a task's request class (`request_class`)."""

    #: Celery's attributes, among them the pool's result for the job, and the time at which the body began.
    id: str
    _apply_result: Any
    time_start: float | None
    hostname: str
    worker_pid: int | None
    request_dict: dict[str, Any]
    end_job: EndJob
    #: True while the worker stops without waiting for its jobs: a job that dies now is handed back, not lost.
    stopping_cold: Callable[[], bool]
    #: Has a function called in the main loop, which alone may send events and signals.
    later: Callable[[Callable[[], None]], None]
    #: The incarnation of the worker.
    incarnation: str
    #: The task's own request class, of which `request_class` made this class.
    plain_class: type
    tag: Tag | None
    #: Results and messages that the body left to be delivered.
    outbox: Outbox
    #: Reason why the worker itself ends the job, '' where it does not.
    ended_by: Literal["", "revoke", "stop"] = ""
    #: True once the job went back before it began.
    handed_back: bool = False
    #: Error of the attempt if the body rejects its message.
    rejected_as: str = "rejected"

    def __init__(self, message: Any, *args: Any, **options: Any) -> None:
        super().__init__(message, *args, **options)  # type: ignore[call-arg]
        self.outbox = Outbox()
        self.tag = parse_tag(message.delivery_tag)
        if self.tag is not None:
            # A task sees this number as self.request.attempt.
            self._request_dict["attempt"] = self.tag.token.attempt  # type: ignore[attr-defined]
            delivery = self._request_dict.setdefault("delivery_info", {})  # type: ignore[attr-defined]
            delivery["redelivered"] = self._is_redelivered(self.tag.token.attempt)
            if self.tag.alternative:
                # A task with alternatives sees the one that it holds as self.request.allocation.
                self._request_dict["allocation"] = request_of(self._request_dict)  # type: ignore[attr-defined]
            carried = self._request_dict.get(HEADER)  # type: ignore[attr-defined]
            if isinstance(carried, Mapping) and ETA in carried:
                # The ETA has come. Celery looked for an ETA before this line, so it holds nothing back.
                self._request_dict["eta"] = carried[ETA]  # type: ignore[attr-defined]

    def _is_redelivered(self, attempt: int) -> bool:
        """Return True if this message came to a worker before. A retry or a replacement is a message of its own."""
        messages = [self._request_dict.get(count) for count in ("retries", "replaced_task_nesting")]  # type: ignore[attr-defined]
        return attempt > 1 + sum(count for count in messages if isinstance(count, int))

    def info(self, safe: bool = False) -> dict[str, Any]:
        """Return the answer to `inspect`: arguments as anybody may see them, the request, and the allocation."""
        facts: dict[str, Any] = super().info(safe=True)  # type: ignore[misc]
        if self.tag is None:
            return facts
        worker = str(self.hostname).partition("@")[0]
        return {**facts, "request": request_of(self.request_dict), "allocation": allocation(worker, self.tag)}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # Celery derives one more class for each task, with an on_success of its own that would hide ours.
        if cls.__qualname__.startswith("create_request_cls."):
            cls.on_success = _ending(cls.__dict__["on_success"])  # type: ignore[attr-defined]
            # Celery's own `execute_using_pool` goes past the method below, which is the general one.
            del cls.execute_using_pool

    def execute_using_pool(self, pool: Any, **options: Any) -> Any:
        if self.handed_back:
            # It waited here for a free process. By now it may run elsewhere, and Celery lets the next one have the
            # process.
            raise TaskRevokedError(self.id)
        if self.tag is not None:
            pool = TracedPool(pool, str(self.tag), type(self).incarnation)
        result = super().execute_using_pool(pool, **options)  # type: ignore[misc]
        future = getattr(result, "f", None)
        if isinstance(future, Future):
            future.add_done_callback(self.future_done)
        elif hasattr(result, "link"):
            result.link(self.greenlet_done)
        return result

    def _end(
        self, outcome: Outcome | Ambiguous, error: str | None = None, on_lost: Callable[[], None] | None = None
    ) -> None:
        if self.tag is not None:
            type(self).end_job(self.tag.job, self.tag.token, outcome, error, self.outbox, on_lost)

    @contextmanager
    def _speaking(self) -> Iterator[None]:
        """Collect in the outbox everything that Celery's hooks store and publish for this job within the block."""
        if self.tag is None:
            yield
            return
        with held(Attempt(self.tag, type(self).incarnation, deferred=True, outbox=self.outbox)):
            yield

    @property
    def never_sent(self) -> bool:
        """Return True if the pool never got the job: it waits for a free process."""
        return self._apply_result is None and self.time_start is None

    def hand_back(self) -> None:
        """Hand back a job that was claimed, and will not start here."""
        self.handed_back = True
        self._end(Outcome.HANDED_BACK, "not started")

    # The row is durable, and the message was only a notice: there is nothing to acknowledge at the broker.

    def acknowledge(self) -> None:
        self.acknowledged = True

    def reject(self, requeue: bool = False) -> None:
        if not getattr(self, "acknowledged", False):
            self.acknowledged = True
            self._end(Outcome.REQUEUED if requeue else Outcome.FAILED, self.rejected_as)
            self.send_event("task-rejected", requeue=requeue)  # type: ignore[attr-defined]

    def on_timeout(self, soft: bool, timeout: float) -> None:
        try:
            with self._speaking():
                super().on_timeout(soft, timeout)  # type: ignore[misc]
        finally:
            if not soft:
                self._end(Ambiguous.BROKEN_OFF, f"TimeLimitExceeded({timeout})")

    def on_failure(self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False) -> Any:
        error = exc_info.exception
        if isinstance(error, ExceptionWithTraceback):
            error = error.exc
        if isinstance(error, WorkerLostError) and not return_ok:
            return self._child_lost(error, exc_info)
        outcome, text = _outcome(error, exc_info)
        if isinstance(error, Reject):
            self.rejected_as = text or self.rejected_as
        if isinstance(error, Ignore) and self.outbox.replaced:
            outcome, text = Outcome.REPLACED, None
        try:
            if isinstance(error, MemoryError):
                # Celery would end the whole worker. The body's process has told the failure already.
                worker_state.task_ready(self)
                self.send_event("task-failed", exception=saferepr(error), traceback=str(exc_info.traceback))  # type: ignore[attr-defined]
                return None
            with self._speaking():
                return super().on_failure(exc_info, send_failed_event=send_failed_event, return_ok=return_ok)  # type: ignore[misc]
        finally:
            if outcome is not None:
                broken_off = outcome is Outcome.FAILED and self.outbox.committed
                self._end(Ambiguous.BROKEN_OFF if broken_off else outcome, text)

    def _child_lost(self, error: WorkerLostError, info: Any) -> None:
        """End an attempt whose process in the pool died with the body.

        The job is not over: it runs again as a new attempt, until it was lost too often. Only then it has a result, and
        a failure that Celery's hooks may see.
        """
        worker_state.task_ready(self)
        if type(self).stopping_cold() or self.ended_by == "stop":
            self._end(Ambiguous.STOPPED, str(error))
            return
        request: Any = self
        logger.warning("job %s: its process died: %s", request.id, error)
        with self._speaking():
            request.task.backend.mark_as_failure(
                request.id, error, request=request._context, store_result=request.store_errors
            )

        self._end(Outcome.LOST, str(error), lambda: self._say_failed(error, info))

    def _say_failed(self, error: Exception, info: Any) -> None:
        """Tell the listeners to events and signals of a failure, as Celery's hooks would have. In any thread."""
        request: Any = self

        def say() -> None:
            signal_failure(request.task, request._context, error, info)
            request.send_event("task-failed", exception=saferepr(error), traceback=info.traceback)

        type(self).later(say)

    def future_done(self, future: Future[Any]) -> None:
        """End the attempt where a threads pool calls no hook of Celery's.

        A threads pool keeps to itself an error that is raised around a body, such as a result that could not be stored.
        When it stops, it drops jobs that it had not begun.
        """
        if future.cancelled():
            self.hand_back()
        elif (error := future.exception()) is not None:
            self._fail(error)

    def greenlet_done(self, greenlet: Any) -> None:
        """End the attempt where a pool of greenlets keeps an error around the body, or a kill, to itself."""
        if (error := problem_of(greenlet)) is not None:
            self.killed() if was_killed(error) else self._fail(error)

    def terminate(self, pool: Any, signal: Any = None) -> None:
        before, self.ended_by = self.ended_by, "revoke"
        try:
            super().terminate(pool, signal)  # type: ignore[misc]
        except NotImplementedError:
            # A thread cannot be ended from outside, so the body goes on.
            self.ended_by = before
            raise

    def cancel(self, pool: Any, signal: Any = None, emit_retry: bool = True) -> None:
        """Break off the body, as a cold stop does.

        Celery stores its state RETRY in a signal's handler, which must not wait for the backend.
        """
        self.ended_by = "stop"
        if abandon_bodies(pool):
            return
        with self._speaking():
            super().cancel(pool, signal, emit_retry)  # type: ignore[misc]

    def break_off(self, pool: Any, signal: str) -> None:
        """Break off the body because its worker is drained. The attempt ends once its process is gone.

        A body that has not begun yet is left alone: the next call meets it.
        """
        if self.never_sent:
            worker_state.task_ready(self)
            self.hand_back()
        elif self.time_start is not None:
            self.ended_by = "stop"
            pool.terminate_job(self.worker_pid, signal_numbers.signum(signal))

    def killed(self) -> None:
        """End an attempt whose greenlet was ended from outside.

        The end of a revoked job is reported already. When the worker stops, the job goes back. Otherwise code that
        knows nothing of jobs ended the greenlet, and the job has failed.
        """
        worker_state.task_ready(self)
        if self.ended_by == "stop":
            self._end(Ambiguous.STOPPED, "the worker was stopped")
        elif not self.ended_by:
            self._fail(TaskError("the greenlet of this job was killed"))

    def _fail(self, error: BaseException) -> None:
        worker_state.task_ready(self)
        request: Any = self
        with self._speaking():
            request.task.backend.mark_as_failure(
                request.id, error, request=request._context, store_result=request.store_errors
            )
        self._end(Outcome.FAILED, saferepr(error))
        if isinstance(error, Exception):
            self._say_failed(error, raised(error))

    def _announce_revoked(self, reason: str, terminated: bool, signum: Any, expired: bool) -> None:
        if terminated and self.ended_by == "stop":
            # A drain ended the process, and no revoke.
            worker_state.task_ready(self)
            self._end(Ambiguous.STOPPED, DRAINED)
            return
        try:
            with self._speaking():
                super()._announce_revoked(reason, terminated, signum, expired)  # type: ignore[misc]
        finally:
            revoked = Ambiguous.TERMINATED if terminated else Outcome.CANCELLED
            self._end(Outcome.EXPIRED if expired else revoked, reason)


def _ending(on_success: Callable[..., Any]) -> Callable[..., Any]:
    def ends_first(self: Any, failed__retval__runtime: Any, **options: Any) -> Any:
        if not isinstance(failed__retval__runtime, tuple):
            # In threads and solo pools Celery 5.7 gives the information of a SystemExit, wrapped as a lost worker, in
            # place of the body's value. No process was lost: the job has failed.
            return self.on_failure(failed__retval__runtime, return_ok=True)
        failed__retval__runtime, self.outbox = unpacked(failed__retval__runtime)
        failed, value, _ = failed__retval__runtime
        if isinstance(value, Killed):
            return self.killed()
        if not failed and value is None:
            # For a returned value, Celery gives a text. None means that it did not call the task with these arguments.
            return self.on_failure(_not_called(), return_ok=False)
        if not failed:
            self._end(Outcome.SUCCEEDED)
            return on_success(self, failed__retval__runtime, **options)
        error = value.exception
        if isinstance(error, ExceptionWithTraceback):
            error = error.exc
        if isinstance(error, (SystemExit, KeyboardInterrupt)):
            # In threads and solo pools Celery raises these errors on, and the worker would end with the task.
            return self.on_failure(value, return_ok=False)
        return on_success(self, failed__retval__runtime, **options)

    return ends_first


def _not_called() -> ExceptionInfo:
    try:
        raise InvalidTaskError("the task was not called: its arguments are not a list and a mapping")
    except InvalidTaskError:
        return ExceptionInfo()


def _outcome(error: BaseException, exc_info: Any) -> tuple[Outcome | Ambiguous | None, str | None]:
    """Return the outcome and the error's text for an attempt with this exception, None where another hook tells it."""
    if isinstance(error, Retry):
        return Outcome.RETRIED, saferepr(error.exc) if error.exc else None
    if isinstance(error, Ignore):
        return Outcome.SUCCEEDED, "ignored"
    if isinstance(error, Reject):
        return (Outcome.REQUEUED if error.requeue else Outcome.FAILED), f"rejected: {error.reason}"
    if isinstance(error, Terminated):
        return None, None
    if isinstance(error, LeaseLost):
        return Ambiguous.LEASE_LOST, saferepr(error)[:ERROR_LENGTH]
    text = f"{saferepr(error)}\n{exc_info.traceback or ''}".strip()
    return Outcome.FAILED, text[:ERROR_LENGTH]


@lru_cache(maxsize=256)
def request_class(
    base: type,
    incarnation: str,
    end_job: EndJob,
    stopping_cold: Callable[[], bool],
    later: Callable[[Callable[[], None]], None],
) -> type:
    """Return a task's request class with the platform's in front of it, for this incarnation of a worker.

    A process that becomes a worker anew, as a test does in a thread, gets a class of the same plain class again.
    """
    if issubclass(base, JobRequest):
        if "plain_class" not in base.__dict__:
            return base
        base = base.plain_class
    return type(
        "Request",
        (JobRequest, base),
        {
            "plain_class": base,
            "incarnation": incarnation,
            "end_job": staticmethod(end_job),
            "stopping_cold": staticmethod(stopping_cold),
            "later": staticmethod(later),
        },
    )
