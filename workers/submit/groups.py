"""Gathering of messages while Celery publishes them, to store them a chunk at a time or all at once.

Bulk submissions and large groups are stored a chunk at a time. Groups and chords in a transaction of the caller's are
stored all at once.

Within `active(gathering)`, Celery's own code builds each message that this thread publishes, up to the moment at which
its sender hands the message over. Celery's next steps, signals and the event `task-sent`, wait until the chunk is
stored.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, Final

from celery import Celery, canvas, signals
from celery.utils.functional import _regen
from celery.utils.nodenames import anon_nodename

from celery_capacity.routing.errors import LeaseLost, PartlyAccepted, PlatformError
from celery_capacity.routing.model.job import NewJob
from celery_capacity.workers.broker.queues import queue_of
from celery_capacity.workers.process import attempts
from celery_capacity.workers.process.stores import Stores
from celery_capacity.workers.submit.chunk_writer import After, ChunkWriter

#: The gathering of each thread.
_of_thread = threading.local()


class _HandedOver(Exception):
    """Signal that Celery's sender has handed its message over, and does no more."""


class _Catcher:
    """Stand-in for kombu's producer: keeps the message that Celery's sender would publish, and leaves the sender."""

    def __init__(self, producer: Any) -> None:
        self._producer = producer
        self.body: Any = None
        self.options: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._producer, name)

    def publish(self, body: Any, **options: Any) -> None:
        self.body, self.options = body, options
        raise _HandedOver


class Gathering:
    """Messages that one app publishes in this thread. They go to `jobs`."""

    def __init__(self, app: Celery, jobs: ChunkWriter) -> None:
        self.amqp: Any = app.amqp
        self._app = app
        self._jobs = jobs
        #: Functions that make a message like the newest one, of its id and its arguments, and that send it.
        self._make: Callable[[str, Any], Any] | None = None
        self._send: Callable[[Any], None] | None = None
        #: The newest job.
        self.newest: NewJob | None = None
        #: Number of messages so far.
        self.count = 0

    @property
    def repeats(self) -> bool:
        """Return True if there has been one message, which `repeat` can make again."""
        # Constraints and limits concern a job alone.
        first = self.newest
        constrained = first is None or first.constraints is not None or first.key_limits is not None
        return self.count == 1 and self._make is not None and not constrained

    def repeat(self, job: str, args: Any) -> None:
        """Publish another message like the newest one, for another job."""
        assert self._make is not None and self._send is not None, "the caller asks `repeats`"
        self._send(self._make(job, args))

    def made(self, name: str, kwargs: Any, more: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Remember the call that made the newest message."""
        options = {"origin": anon_nodename(), **options}
        del options["argsrepr"]
        make = self.amqp.create_task_message
        self._make = lambda job, args: make(job, name, args, kwargs, *more, **options)

    def publish(self, plain: Callable[..., Any], producer: Any, name: str, message: Any, options: Any) -> None:
        """Take a message in place of Celery's sender `plain`."""
        self._send = lambda another: self._publish(plain, None, name, another, options)
        self._publish(plain, producer, name, message, options)

    def _publish(self, plain: Callable[..., Any], producer: Any, name: str, message: Any, options: Any) -> None:
        catcher = _Catcher(producer)
        try:
            plain(catcher, name, message, **options)
        except _HandedOver:
            self._take(name, message, options, catcher)

    def _take(self, name: str, message: Any, options: dict[str, Any], caught: _Catcher) -> None:
        self.add(self.encode(caught.body, caught.options), self._after(name, message, options, caught))

    def add(self, job: NewJob, after: After = None) -> None:
        """Take a job. `after` is called once it is stored."""
        self.count += 1
        self.newest = job
        with active(None):
            self._jobs.add(job, after)

    def encode(self, body: Any, options: dict[str, Any]) -> NewJob:
        """Return the job that a message makes, as its sender published it."""
        properties = {name: value for name, value in options.items() if name not in _PUBLISHING}
        exchange, key = options["exchange"], options["routing_key"]
        job: NewJob = self.amqp.job_sender.encode(
            body,
            headers=options["headers"],
            serializer=options["serializer"],
            compression=options["compression"],
            routing_key=queue_of(self.amqp.queues, exchange, key) if exchange else key,
            properties=properties,
        )
        return job

    def _after(self, name: str, message: Any, options: dict[str, Any], caught: _Catcher) -> After:
        """Return a callback with the steps of Celery's sender after a publish. None where nobody listens."""
        event = message[3]
        if not (signals.after_task_publish.receivers or signals.task_sent.receivers or event):
            return None
        body, sent = caught.body, caught.options
        headers, exchange, routing_key = sent["headers"], sent["exchange"], sent["routing_key"]

        def after() -> None:
            signals.after_task_publish.send(
                sender=name, body=body, headers=headers, exchange=exchange, routing_key=routing_key
            )
            if signals.task_sent.receivers:
                signals.task_sent.send(
                    sender=name,
                    task_id=headers["id"],
                    task=name,
                    args=body[0],
                    kwargs=body[1],
                    eta=headers["eta"],
                    taskset=headers["group"],
                )
            if event:
                event.update(queue=routing_key, exchange=exchange, routing_key=routing_key)
                dispatcher = options.get("event_dispatcher") or self.amqp._event_dispatcher
                with self._app.producer_or_acquire() as producer:
                    dispatcher.publish(
                        "task-sent", event, producer, retry=sent["retry"], retry_policy=sent["retry_policy"]
                    )

        return after


#: Options that Celery's sender passes to a producer besides the properties of the message.
_PUBLISHING: Final = frozenset(
    {
        "headers",
        "serializer",
        "compression",
        "routing_key",
        "exchange",
        "retry",
        "retry_policy",
        "delivery_mode",
        "declare",
        "timeout",
        "confirm_timeout",
    }
)


def gathering_of(amqp: Any) -> Gathering | None:
    """Return this thread's gathering for an app's AMQP, None where each message goes by itself."""
    gathering: Gathering | None = getattr(_of_thread, "gathering", None)
    return gathering if gathering is not None and gathering.amqp is amqp else None


@contextmanager
def active(gathering: Gathering | None) -> Iterator[None]:
    """Publish into a gathering within the block, in this thread. None: publish as if there were no gathering."""
    before = getattr(_of_thread, "gathering", None)
    _of_thread.gathering = gathering
    try:
        yield
    finally:
        _of_thread.gathering = before


@contextmanager
def stored_together(app: Celery, jobs: ChunkWriter) -> Iterator[Gathering]:
    """Gather jobs within the block, and store them by its end.

    After an error, the jobs that were taken before it are accepted. Where some of them stay, the error is raised as the
    cause of `PartlyAccepted`. Where none stays, and for a `LeaseLost`, it is raised as it is.
    """
    try:
        yield Gathering(app, jobs)
        jobs.flush()
    except Exception as error:
        first = error
        if not jobs.failed:
            try:
                jobs.flush()
            except Exception as another:
                first = another
        if isinstance(first, PlatformError):
            app.platform.tally.refuse(first)
        if isinstance(first, LeaseLost) or not jobs.stand:
            raise first from first.__cause__
        message = f"{jobs.accepted} jobs were accepted, then one was not: {first}"
        raise PartlyAccepted(jobs.accepted, jobs.unknown, message) from first
    finally:
        jobs.close()


@contextmanager
def within_session(app: Celery, session: Any) -> Iterator[None]:
    """Write all jobs that are published within the block into a session's transaction, or none of them.

    They are written at the end of the block, after all of them were checked. A refusal by Postgres then fails the whole
    transaction. Raises `InvalidRequest` for a session that cannot be used, before anything is published.
    """
    # Imported late: it loads SQLAlchemy's ORM.
    from celery_capacity.workers.submit.session_jobs import SessionJobs

    transaction = SessionJobs(app.amqp.job_sender, app.platform, session)
    transaction.check()
    jobs = ChunkWriter(app.amqp.job_sender, app.platform, attempts.current(), sys.maxsize, within=transaction.add)
    with active(Gathering(app, jobs)):
        yield
    jobs.flush()


# -- groups and chords


def in_transaction(apply_async: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap Celery's `chord.apply_async`, so that all it publishes is part of a session's transaction.

    Celery's own hands its options on to the messages of its header, and a session cannot be there.
    """

    @wraps(apply_async)
    def applied(self: Any, *args: Any, session: Any = None, **options: Any) -> Any:
        if session is None:
            return apply_async(self, *args, **options)
        app = self.app
        if not isinstance(getattr(app, "platform", None), Stores):
            return apply_async(self, *args, session=session, **options)
        if app.conf.task_always_eager:
            return apply_async(self, *args, **options)
        if isinstance(self.tasks, _regen):
            # Make the header first: jobs that the caller's own code publishes meanwhile are no part of this.
            list(self.tasks)
        with within_session(app, session):
            return apply_async(self, *args, **options)

    return applied


def in_chunks(apply_tasks: Callable[..., Iterable[Any]]) -> Callable[..., Iterable[Any]]:
    """Wrap Celery's `group._apply_tasks`, so that the tasks go together where the group's app is on the platform.

    `group` is a class that people import: no app has one of its own.
    """

    @wraps(apply_tasks)
    def applied(
        self: Any, tasks: Iterable[Any], producer: Any = None, app: Celery | None = None, *more: Any, **options: Any
    ) -> Iterable[Any]:
        app = app or self.app
        on_platform = isinstance(getattr(app, "platform", None), Stores)
        if on_platform and options.get("session") is not None:
            with within_session(app, options.pop("session")):
                return list(apply_tasks(self, _aside(tasks), producer, app, *more, **options))
        attempt = attempts.current()
        # A job that the worker itself publishes may not wait, or waits for Postgres. In a group within a group the
        # outer group gathers.
        alone = attempt is not None and (attempt.deferred or attempt.patient is not None)
        if not on_platform or alone or gathering_of(app.amqp) is not None:
            return apply_tasks(self, tasks, producer, app, *more, **options)
        jobs = ChunkWriter(app.amqp.job_sender, app.platform, attempt)
        # The tasks come from a generator of the caller's.
        jobs.ages = isinstance(self.tasks, _regen)
        with stored_together(app, jobs) as gathering, active(gathering):
            return list(apply_tasks(self, _aside(tasks), producer, app, *more, **options))

    return applied


def _aside(tasks: Iterable[Any]) -> Iterator[Any]:
    """Yield tasks, and do not gather the jobs that their iterator publishes.

    A generator of the user's may publish jobs while it makes the tasks, and may wait for them.
    """
    iterator = iter(tasks)
    while True:
        with active(None):
            try:
                task = next(iterator)
            except StopIteration:
                return
        yield task


def connect() -> None:
    """Have Celery store groups together, and accept a session for chords. One call serves all apps."""
    if not hasattr(canvas.group._apply_tasks, "__wrapped__"):
        canvas.group._apply_tasks = in_chunks(canvas.group._apply_tasks)
        canvas._chord.apply_async = in_transaction(canvas._chord.apply_async)
