"""Celery's AMQP, with the platform's sender behind `send_task_message` and the worker's own queue to consume."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping
from functools import cached_property, lru_cache, partial
from typing import TYPE_CHECKING, Any, Final

from celery.utils.nodenames import anon_nodename
from kombu import Queue
from kombu.pools import ProducerPool
from kombu.serialization import prepare_accept_content

from celery_capacity.routing import os_threads
from celery_capacity.routing.config import redis_urls
from celery_capacity.routing.errors import InvalidRequest
from celery_capacity.routing.ledger import sentinels
from celery_capacity.routing.model.message import PLATFORM_PREFIX
from celery_capacity.workers.broker import beat_messages
from celery_capacity.workers.broker.lazy_producer import SpareProducer
from celery_capacity.workers.broker.queues import queue_of
from celery_capacity.workers.broker.transport import Connection
from celery_capacity.workers.process.stores import Stores
from celery_capacity.workers.submit.encode import shown
from celery_capacity.workers.submit.groups import gathering_of
from celery_capacity.workers.submit.router import Router
from celery_capacity.workers.submit.sender import Sender

if TYPE_CHECKING:
    from celery_capacity.workers.submit.session_jobs import SessionJobs

logger = logging.getLogger(__name__)


#: Index of `origin` among the positional arguments of Celery's `as_task_v2` behind `kwargs`.
_ORIGIN: Final = 19


@lru_cache(maxsize=1)
def origin(process: int) -> str:
    """Return the `origin` of a message: the name of its sending process, in Celery's form.

    Celery makes the name for each message; here it is cached. `process` is a process id, so that a forked child gets a
    name of its own.
    """
    name: str = anon_nodename()
    return name


class _JobProducer:
    """Stand-in for kombu's producer while Celery sends one task: the published message becomes a row.

    A later publish is the event `task-sent`. Celery's dispatcher keeps an event whose publish raises.
    """

    def __init__(self, producer: Any, sender: Sender | SessionJobs, queues: Mapping[str, Queue]) -> None:
        self._producer = producer
        self._sender = sender
        self._queues = queues
        #: True once the job is durable: a caller that gets an error would send it again.
        self.accepted = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._producer, name)

    def publish(
        self,
        body: Any,
        *,
        headers: dict[str, Any],
        serializer: str | None = None,
        compression: str | None = None,
        routing_key: str | None = None,
        exchange: Any = None,
        retry: Any = None,
        retry_policy: Any = None,
        delivery_mode: Any = None,
        declare: Any = None,
        timeout: Any = None,
        confirm_timeout: Any = None,
        **properties: Any,
    ) -> None:
        if self.accepted:
            event_options = {"serializer": serializer, "compression": compression, "delivery_mode": delivery_mode}
            event_options |= {"exchange": exchange, "routing_key": routing_key, "declare": declare, "timeout": timeout}
            self._producer.publish(
                body, headers=headers, retry=retry, retry_policy=retry_policy, **event_options, **properties
            )
            return
        job = self._sender.accept(
            body,
            headers=headers,
            serializer=serializer,
            compression=compression,
            routing_key=queue_of(self._queues, exchange, routing_key) if exchange else routing_key,
            properties=properties,
        )
        self.accepted = True
        if isinstance(self._producer, SpareProducer):
            self._producer.job, self._producer.serializer = job, serializer


class PlatformAMQP:
    """Mixin for the app's own AMQP class, applied by `amqp_class`. `stores` belongs to the app."""

    stores: Stores
    app: Any
    #: Ends the waiting jobs of a queue. Gets the app, its stores and the queue's name; returns the number of jobs.
    purge_queue: Callable[[Any, Stores, str], int]

    def Connection(self, *args: Any, **options: Any) -> Connection:  # noqa: N802
        """Make a connection with the platform's transports. Celery makes all its connections by this method."""
        connection = Connection(*args, **options)
        if redis_urls.MASTER in (connection.transport_options or {}):
            asking = sentinels.asking(self.stores.settings.store_timeout)
            connection.transport_options = {"sentinel_kwargs": asking, **connection.transport_options}
        connection.purge_jobs = partial(self.purge_queue, self.app, self.stores)
        return connection

    def _create_task_sender(self) -> Any:
        plain = super()._create_task_sender()  # type: ignore[misc]
        sender = self.job_sender
        queues: Mapping[str, Queue] = self.queues  # type: ignore[attr-defined]

        def send_task_message(producer: Any, name: str, message: Any, session: Any = None, **options: Any) -> Any:
            if name in beat_messages.NAMES:
                return beat_messages.publish(producer, name)
            if name.startswith(PLATFORM_PREFIX):
                advice = f"{PLATFORM_PREFIX} begins the platform's own names."
                raise InvalidRequest(f"no task may be named {name}", value=name, advice=advice)
            if session is not None:
                # Imported late: few programs use it, and it loads SQLAlchemy's ORM.
                from celery_capacity.workers.submit.session_jobs import SessionJobs

                jobs = _JobProducer(producer, SessionJobs(sender, self.stores, session), queues)
            else:
                gathering = gathering_of(self)
                if gathering is not None:
                    return gathering.publish(plain, producer, name, message, options)
                jobs = _JobProducer(producer, sender, queues)
            try:
                return plain(jobs, name, message, **options)
            except Exception as error:
                if not jobs.accepted:
                    raise
                logger.warning("a job is accepted, and a step after its submission failed: %r", error)
                return None

        return send_task_message

    def as_task_v2(
        self, task_id: str, name: str, args: Any = None, kwargs: Any = None, *more: Any, **options: Any
    ) -> Any:
        """Make a message as Celery does, and hide secrets in `argsrepr` and `kwargsrepr`.

        Logs, events and pages show the arguments by these two headers. Values that look secret are left out of them.
        """
        for header, arguments in (("argsrepr", args or ()), ("kwargsrepr", kwargs or {})):
            if options.get(header) is None:
                options[header] = self.shown(header, arguments)
        if len(more) <= _ORIGIN:
            options.setdefault("origin", origin(os.getpid()))
        gathering = gathering_of(self)
        if gathering is not None:
            gathering.made(name, kwargs, more, options)
        return super().as_task_v2(task_id, name, args, kwargs, *more, **options)  # type: ignore[misc]

    def shown(self, header: str, arguments: Any) -> str:
        """Return the header (argsrepr or kwargsrepr) that shows these arguments."""
        if not arguments:
            return repr(arguments)
        most: int = getattr(self, f"{header}_maxsize")
        return shown(arguments, most, self.app.conf.task_repr_maxlevels)

    def _retry_publish(self, publish: Any, *args: Any, **options: Any) -> Any:
        """Publish as Celery does, without a priority of None. A task publishes its followers by this method.

        Where there is no priority to inherit, Celery hands on None. That None would override the priority given to the
        body of a chord.
        """
        if options.get("priority", 0) is None:
            del options["priority"]
        return super()._retry_publish(publish, *args, **options)  # type: ignore[misc]

    @property
    def job_sender(self) -> Sender:
        sender: Sender | None = self.__dict__.get("_job_sender")
        if sender is None:
            app = self.app
            sender = self.__dict__["_job_sender"] = Sender(
                self.stores,
                app.conf.task_default_queue,
                app.timezone,
                prepare_accept_content(app.conf.accept_content),
            )
        return sender

    @property
    def producer_pool(self) -> Any:
        """Return the process's pool of producers.

        Beside greenlets each thread of the platform has a pool of its own, because its connections are its own.
        """
        if not os_threads.is_apart():
            return super().producer_pool  # type: ignore[misc]
        thread_values = self.apart.__dict__
        if "pool" not in thread_values:
            thread_values["pool"] = ProducerPool(self.app.connection_for_write().Pool(1), limit=1)
        return thread_values["pool"]

    @cached_property
    def apart(self) -> threading.local:
        """Return the store of values that belong to one thread, such as its pool of producers."""
        return threading.local()

    def flush_routes(self) -> None:
        super().flush_routes()  # type: ignore[misc]
        # Our router comes first, also where the user's configuration has set task_routes anew. A router before it would
        # end the search.
        mine = [route for route in self._rtable if isinstance(route, Router)]  # type: ignore[has-type]
        others = [route for route in self._rtable if not isinstance(route, Router)]  # type: ignore[has-type]
        self._rtable = [*(mine or [Router(self.stores, lambda: self.app.tasks)]), *others]

    def TaskConsumer(self, channel: Any, queues: Any = None, accept: Any = None, **options: Any) -> Any:  # noqa: N802
        if getattr(channel, "consumes_nothing", False) and queues is None:
            accept = self.app.conf.accept_content if accept is None else accept
            return self.Consumer(channel, queues=[], accept=accept, **options)  # type: ignore[attr-defined]
        return super().TaskConsumer(channel, queues=queues, accept=accept, **options)  # type: ignore[misc]


def amqp_class(base: type, stores: Stores, purge_queue: Callable[[Any, Stores, str], int]) -> type:
    """Return the app's AMQP class with the platform's mixin in front of it."""
    return type("AMQP", (PlatformAMQP, base), {"stores": stores, "purge_queue": staticmethod(purge_queue)})
