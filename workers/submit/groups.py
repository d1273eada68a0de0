"""Messages that are gathered while Celery publishes them, and stored a chunk at a time: bulk submission, large groups;
or all at once, where they are part of a transaction of the caller's: groups and chords.

Within `gathering(...)` what this thread publishes is built by Celery's own code up to the moment at which its sender
hands the message over. What Celery does after that (signals, the event `task-sent`) waits until the chunk is stored.
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

from celery_capacity.routing.errors import LeaseLost, PartlyAccepted
from celery_capacity.routing.model.job import NewJob
from celery_capacity.workers.broker.queues import queue_of
from celery_capacity.workers.process import attempts
from celery_capacity.workers.process.stores import Stores
from celery_capacity.workers.submit.chunk_writer import After, Chunks

_here = threading.local()


class _HandedOver(Exception):
    """Celery's sender has handed its message over, and does no more."""


class _Catcher:
    """Stands for kombu's producer: keeps what Celery's sender would publish, and leaves the sender there."""

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
    """What one app publishes in this thread. `jobs`: where they go."""

    def __init__(self, app: Celery, jobs: Chunks) -> None:
        self.amqp: Any = app.amqp
        self._app = app
        self._jobs = jobs
        #: What makes and sends a message like the newest one, given its id and its arguments.
        self._make: Callable[[str, Any], Any] | None = None
        self._send: Callable[[Any], None] | None = None
        #: Whether something holds the newest job back that concerns it alone.
        self._gated = False
        #: Messages so far.
        self.count = 0

    @property
    def repeats(self) -> bool:
        """Whether there has been one message, which `repeat` can make again."""
        return self.count == 1 and self._make is not None and not self._gated

    def repeat(self, job: str, args: Any) -> None:
        """Another message like the newest one, for another job."""
        assert self._make is not None and self._send is not None, "the caller asks `repeats`"
        self._send(self._make(job, args))

    def made(self, name: str, kwargs: Any, more: tuple[Any, ...], options: dict[str, Any]) -> None:
        """The call by which the newest message was made."""
        options = {"origin": anon_nodename(), **options}
        del options["argsrepr"]
        make = self.amqp.create_task_message
        self._make = lambda job, args: make(job, name, args, kwargs, *more, **options)

    def publish(self, plain: Callable[..., Any], producer: Any, name: str, message: Any, options: Any) -> None:
        """In place of Celery's sender `plain`."""
        self._send = lambda another: self._publish(plain, None, name, another, options)
        self._publish(plain, producer, name, message, options)

    def _publish(self, plain: Callable[..., Any], producer: Any, name: str, message: Any, options: Any) -> None:
        catcher = _Catcher(producer)
        try:
            plain(catcher, name, message, **options)
        except _HandedOver:
            self._take(name, message, options, catcher)

    def _take(self, name: str, message: Any, options: dict[str, Any], caught: _Catcher) -> None:
        job, after = self.encode(caught.body, caught.options), self._after(name, message, options, caught)
        self.count += 1
        self._gated = job.gates is not None
        with active(None):
            self._jobs.add(job, after)

    def encode(self, body: Any, options: dict[str, Any]) -> NewJob:
        """The job that a message makes, as its sender published it."""
        properties = {name: value for name, value in options.items() if name not in _PUBLISHING}
        exchange, key = options["exchange"], options["routing_key"]
        job: NewJob = self.amqp.job_sender.encoded(
            body,
            headers=options["headers"],
            serializer=options["serializer"],
            compression=options["compression"],
            routing_key=queue_of(self.amqp.queues, exchange, key) if exchange else key,
            properties=properties,
        )
        return job

    def _after(self, name: str, message: Any, options: dict[str, Any], caught: _Catcher) -> After:
        """What Celery's sender does when it has published a message."""
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


#: What Celery's sender passes to a producer besides the properties of the message.
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


def here(amqp: Any) -> Gathering | None:
    """What gathers the messages that this thread publishes by an app's AMQP, None where each goes by itself."""
    found: Gathering | None = getattr(_here, "gathering", None)
    return found if found is not None and found.amqp is amqp else None


@contextmanager
def active(gathering: Gathering | None) -> Iterator[None]:
    """Within, this thread publishes into a gathering; None: as if there were none."""
    before = getattr(_here, "gathering", None)
    _here.gathering = gathering
    try:
        yield
    finally:
        _here.gathering = before


@contextmanager
def stored_together(app: Celery, jobs: Chunks) -> Iterator[Gathering]:
    """What is gathered within is stored at the end, if not before. An error leaves what was taken before it accepted:
    it is raised as it is where nothing of that stands, else as the cause of `PartlyAccepted`."""
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
        if isinstance(first, LeaseLost) or not jobs.stand:
            raise first from first.__cause__
        said = f"{jobs.accepted} jobs were accepted, then one was not: {first}"
        raise PartlyAccepted(jobs.accepted, jobs.unknown, said) from first
    finally:
        jobs.close()


@contextmanager
def within_session(app: Celery, session: Any) -> Iterator[None]:
    """What is published within is written at its end, into the transaction of a session: all of it, or nothing.

    Nothing is written before all is known to be right; what Postgres refuses after that fails the whole transaction.
    Raises `InvalidRequest` for a session that cannot be used, before anything is published.
    """
    # (It loads SQLAlchemy's ORM.)
    from celery_capacity.workers.submit.caller_session import Transaction

    transaction = Transaction(app.amqp.job_sender, app.platform, session)
    transaction.check()
    jobs = Chunks(app.amqp.job_sender, app.platform, attempts.current(), sys.maxsize, within=transaction.add)
    with active(Gathering(app, jobs)):
        yield
    jobs.flush()


# -- groups and chords


def in_transaction(apply_async: Callable[..., Any]) -> Callable[..., Any]:
    """Celery's `chord.apply_async`, which hands its options on to the messages of its header, where a session cannot
    be: here all that it publishes is part of the session's transaction."""

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
            # What the caller's own code publishes while it makes the header is no part of this.
            list(self.tasks)
        with within_session(app, session):
            return apply_async(self, *args, **options)

    return applied


def in_chunks(apply_tasks: Callable[..., Iterable[Any]]) -> Callable[..., Iterable[Any]]:
    """Celery's `group._apply_tasks`, whose tasks go together where the group's app is on the platform. (Group is a
    class that people import: no app has one of its own.)"""

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
        # What the worker itself publishes may not wait, or waits for Postgres; and in a group within a group the outer
        # one gathers.
        alone = attempt is not None and (attempt.deferred or attempt.patient is not None)
        if not on_platform or alone or here(app.amqp) is not None:
            return apply_tasks(self, tasks, producer, app, *more, **options)
        jobs = Chunks(app.amqp.job_sender, app.platform, attempt)
        with stored_together(app, jobs) as found, active(found):
            return list(apply_tasks(self, _aside(tasks), producer, app, *more, **options))

    return applied


def _aside(tasks: Iterable[Any]) -> Iterator[Any]:
    """The same; what their own code publishes while it makes them (a generator of the user's) is not gathered: it may
    wait for that."""
    iterator = iter(tasks)
    while True:
        with active(None):
            try:
                task = next(iterator)
            except StopIteration:
                return
        yield task


def connect() -> None:
    """Have groups go together, and chords with a session. Once for all apps."""
    if not hasattr(canvas.group._apply_tasks, "__wrapped__"):
        canvas.group._apply_tasks = in_chunks(canvas.group._apply_tasks)
        canvas._chord.apply_async = in_transaction(canvas._chord.apply_async)
