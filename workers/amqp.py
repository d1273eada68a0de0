"""Celery's AMQP, with the platform's sender behind `send_task_message` and the worker's own queue to consume."""

from __future__ import annotations

from typing import Any

from celery.app.amqp import AMQP
from kombu import Exchange, Queue

from workers import ticks
from workers.router import PLATFORM_PREFIX, Router
from workers.sender import Sender
from workers.stores import Stores


class _JobProducer:
    """Stands for kombu's producer while Celery sends a task: what it publishes becomes a row."""

    def __init__(self, producer: Any, sender: Sender) -> None:
        self._producer = producer
        self._sender = sender

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
        self._sender.accept(
            body,
            headers=headers,
            serializer=serializer,
            compression=compression,
            routing_key=routing_key,
            properties=properties,
        )


class PlatformAMQP:
    """Mixed into the app's own AMQP class (`amqp_class`). `stores` belongs to the app; `private_queue` is the name of
    the queue that this process, as a worker, consumes."""

    stores: Stores
    private_queue: str | None = None

    def _create_task_sender(self) -> Any:
        plain = super()._create_task_sender()  # type: ignore[misc]
        sender = self.job_sender

        def send_task_message(producer: Any, name: str, message: Any, **options: Any) -> Any:
            if name.startswith(PLATFORM_PREFIX):
                return ticks.publish(producer, name)
            return plain(_JobProducer(producer, sender), name, message, **options)

        return send_task_message

    @property
    def job_sender(self) -> Sender:
        found: Sender | None = self.__dict__.get("_job_sender")
        if found is None:
            app = self.app  # type: ignore[attr-defined]
            found = self.__dict__["_job_sender"] = Sender(self.stores, app.conf.task_default_queue, app.timezone)
        return found

    def flush_routes(self) -> None:
        super().flush_routes()  # type: ignore[misc]
        # First, also where the user's configuration set task_routes anew; routers before it would end the search.
        mine = [route for route in self._rtable if isinstance(route, Router)]  # type: ignore[has-type]
        others = [route for route in self._rtable if not isinstance(route, Router)]  # type: ignore[has-type]
        self._rtable = [*(mine or [Router(self.stores, lambda: self.app.tasks)]), *others]  # type: ignore[attr-defined]

    def TaskConsumer(self, channel: Any, queues: Any = None, accept: Any = None, **options: Any) -> Any:  # noqa: N802
        if self.private_queue is not None and queues is None:
            # Everything in it was admitted to this worker, and the row is durable: no acknowledgements.
            queues = [
                Queue(
                    self.private_queue,
                    Exchange(""),
                    routing_key=self.private_queue,
                    durable=False,
                    no_declare=True,
                )
            ]
            options["no_ack"] = True
        return super().TaskConsumer(channel, queues=queues, accept=accept, **options)  # type: ignore[misc]


def amqp_class(base: type = AMQP, stores: Stores | None = None) -> type:
    """The app's AMQP class with the platform's in front of it."""
    return type("AMQP", (PlatformAMQP, base), {"stores": stores})
