"""Events and signals of a job that Celery's own request does not send.

`task-waiting` and `task-admitted` are events of the platform's own. Some jobs end while no worker holds them: they are
revoked in the backlog, expire, fit no worker or are lost. Then a worker sends what Celery's worker would:
`task-revoked` and the signal `task_revoked`, or `task-failed` and `task_failure`. All are sent in the main loop, by the
consumer's own dispatcher, which no other thread may use.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

from billiard.einfo import ExceptionInfo
from celery import signals
from celery import states as celery_states
from celery.app.task import Context
from celery.events import Event
from celery.exceptions import TaskError, WorkerLostError
from celery.utils.saferepr import saferepr
from sqlalchemy import Engine, text

from celery_capacity.routing.config.redaction import hidden_text
from celery_capacity.routing.errors import Infeasible, PlatformError
from celery_capacity.routing.model.message import HEADER, Tag, decode, parse_tag
from celery_capacity.routing.model.request import Request
from celery_capacity.routing.model.states import State

logger = logging.getLogger(__name__)

#: States that Celery's `State` makes of the platform's events, and Celery's own states of equal precedence. Celery puts
#: an unknown state above STARTED and REVOKED, so that an admitted job would never be seen to start.
EQUAL_STATES: Final = {"WAITING": "PENDING", "ADMITTED": "REJECTED"}

#: Sender of the events of jobs that wait. Flower shows a job on the sender of its newest event, which must not be the
#: worker that wrote the row.
BACKLOG: Final = "backlog"

#: Largest message, in bytes, whose arguments an event shows. Else a full backlog of large messages would be read.
READ_UP_TO: Final = 65_536

_ROWS: Final = text(
    "SELECT id, name, attempt, request, queue, CASE WHEN octet_length(message) <= :bytes THEN message END AS message "
    "FROM jobs WHERE id = ANY(CAST(:ids AS text[]))"
)


def failure_of(error: str) -> Exception:
    """Return the exception of a job that failed while no worker held it: infeasible, or replaced."""
    return Infeasible(error) if Infeasible.is_told_by(error) else TaskError(error)


def teach_states() -> None:
    """Tell this process's Celery the precedence of the states of the platform's events (Flower, `celery events`)."""
    for name, equal in EQUAL_STATES.items():
        celery_states.PRECEDENCE_LOOKUP[name] = celery_states.PRECEDENCE_LOOKUP[equal]


def allocation(worker: str, tag: Tag) -> dict[str, Any]:
    """Return the fields that events and `inspect` show of the allocation that an attempt holds."""
    return {"worker": worker, "attempt": tag.token.attempt, "token": str(tag.token)}


def request_of(headers: Any) -> dict[str, int | float] | None:
    """Return the request that a message carries, in people's units; None where it carries none."""
    carried = headers.get(HEADER) if isinstance(headers, dict) else None
    if not isinstance(carried, dict):
        return None
    try:
        return Request.from_shape(str(carried.get("shape"))).to_people()
    except PlatformError:
        return None


def signal_failure(task: Any, request: Context, error: BaseException, info: ExceptionInfo) -> None:
    """Send `task_failure` as Celery's own request does, with the job's request on the stack of its task.

    `task` is the bare name where this process does not know the task.
    """
    stack = getattr(task, "request_stack", None)
    if stack is not None:
        stack.push(request)
    try:
        signals.task_failure.send(
            sender=task,
            task_id=request.id,
            exception=error,
            args=request.args,
            kwargs=request.kwargs,
            traceback=info.traceback,
            einfo=info,
        )
    finally:
        if stack is not None:
            stack.pop()


def raised(error: Exception) -> ExceptionInfo:
    """Return the information that Celery shows of an exception, for an exception that nobody has raised."""
    try:
        raise error
    except type(error):
        return ExceptionInfo()


def _event_of_backlog(kind: str, **fields: Any) -> Any:
    """Make an event that no worker sends."""
    return Event(kind, **{**fields, "hostname": BACKLOG})


class Announcer:
    """Sender of events and signals of one worker.

    `wake` makes the main loop call `say`. `consumer` is Celery's, set once it is there.
    """

    def __init__(self, app: Any, engine: Engine, worker: str, wake: Callable[[], None]) -> None:
        self._app = app
        self._engine = engine
        self._worker = worker
        self._wake = wake
        self.consumer: Any = None
        self._pending: deque[Callable[[], None]] = deque()

    @property
    def events(self) -> Any:
        """Return Celery's dispatcher where events are sent (`-E`), else None."""
        dispatcher = getattr(self.consumer, "event_dispatcher", None)
        if dispatcher is None or not dispatcher.enabled:
            return None
        return None if dispatcher.groups and "task" not in dispatcher.groups else dispatcher

    def say(self) -> None:
        """Send what other threads left to be sent; in the main loop. An error here concerns no job."""
        while self._pending:
            try:
                self._pending.popleft()()
            except Exception:
                logger.exception("an event or signal of a job could not be sent")

    def later(self, action: Callable[[], None]) -> None:
        """Have the main loop run an action; callable in any thread."""
        self._pending.append(action)
        self._wake()

    def admitted(self, message: Any) -> None:
        """Announce the admission of a message that is about to become a request; in the main loop."""
        events = self.events
        if events is None:
            return
        tag, headers = parse_tag(message.delivery_tag), message.headers
        name = headers.get("task") if isinstance(headers, dict) else None
        if tag is None or not self._sends(name):
            return
        try:
            events.send(
                "task-admitted",
                uuid=tag.job,
                name=name,
                attempt=tag.token.attempt,
                request=request_of(headers),
                queue=(message.delivery_info or {}).get("routing_key"),
                allocation=allocation(self._worker, tag),
            )
        except Exception:
            # After any error the job starts all the same.
            logger.exception("the admission of job %s could not be announced", tag.job)

    def waiting(self, applied: Sequence[Any]) -> None:
        """Announce changed rows (`routing.store.job_transitions.Applied`) that wait now.

        The calling thread may ask Postgres.
        """
        ids = [change.job for change in applied if change.state == State.WAITING]
        if not ids or self.events is None:
            return
        with self._engine.connect() as connection:
            rows = connection.execute(_ROWS, {"ids": ids, "bytes": READ_UP_TO}).all()
        for row in rows:
            if self._sends(row.name):
                self.later(lambda row=row: self._send_waiting(row))  # type: ignore[misc]

    def _send_waiting(self, row: Any) -> None:
        if self.events is not None:
            headers = {} if row.message is None else decode(bytes(row.message)).get("headers") or {}
            call = {"args": "argsrepr", "kwargs": "kwargsrepr", "root_id": "root_id", "parent_id": "parent_id"}
            fields = {field: headers.get(header) for field, header in call.items()}
            # A producer that knows nothing of the platform hides nothing.
            fields |= {name: hidden_text(str(fields[name])) for name in ("args", "kwargs") if fields[name] is not None}
            fields |= {"name": row.name, "attempt": row.attempt, "request": row.request, "queue": row.queue}
            self.events.send("task-waiting", uuid=row.id, allocation=None, Event=_event_of_backlog, **fields)

    def refused(self, message: Any) -> None:
        """Signal that a message of an old producer is no task's, and was set aside; in any thread."""
        self.later(lambda: signals.task_rejected.send(sender=self.consumer, message=message, exc=None))

    def failed(self, job: str, name: Any, error: Exception) -> None:
        """Announce that a job that was admitted here has failed, and will never be a request; in any thread."""
        self.later(lambda: self._send_failed(job, name, error))

    def _send_failed(self, job: str, name: Any, error: Exception) -> None:
        events = self.events if self._sends(name) else None
        if events is not None:
            events.send("task-failed", uuid=job, exception=saferepr(error), traceback="")

    def ended(self, job: str, state: State, error: str, request: Context) -> None:
        """Announce the end of a job that no worker held, and whose result says so; in any thread."""
        self.later(lambda: self._say_end(job, state, error, request))

    def _say_end(self, job: str, state: State, error: str, request: Context) -> None:
        task = self._app.tasks.get(request.task, request.task)
        events = self.events if self._sends(request.task) else None
        if state in (State.LOST, State.FAILED):
            failure = WorkerLostError(error) if state is State.LOST else failure_of(error)
            info = raised(failure)
            signal_failure(task, request, failure, info)
            if events is not None:
                events.send("task-failed", uuid=job, exception=saferepr(failure), traceback=info.traceback)
            return
        expired = state is State.EXPIRED
        if events is not None:
            events.send("task-revoked", uuid=job, terminated=False, signum=None, expired=expired)
        signals.task_revoked.send(sender=task, request=request, terminated=False, signum=None, expired=expired)

    def _sends(self, name: Any) -> bool:
        task = self._app.tasks.get(name) if isinstance(name, str) else None
        return bool(getattr(task, "send_events", True))
