"""Celery's consumer, between the worker's private queue and its pool: messages are claimed before they become requests.

It wires; what is decided is in `ledger_thread` and `requests`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from celery.bootsteps import RUN
from celery.worker import consumer as celery_consumer
from celery.worker import state as worker_state
from kombu.utils.imports import symbol_by_name

from workers.requests import JobRequest, request_class
from workers.runtime import Runtime, runtime_of

logger = logging.getLogger(__name__)


class Consumer(celery_consumer.Consumer):
    """`worker_consumer` of an app on the platform."""

    def __init__(self, *args: Any, worker_options: dict[str, Any] | None = None, **options: Any) -> None:
        # Workers find each other in the ledger; a chat between all of them does not grow to a thousand.
        quiet = {"without_mingle": True, "without_gossip": True}
        super().__init__(*args, worker_options={**(worker_options or {}), **quiet}, **options)

    @property
    def runtime(self) -> Runtime:
        return runtime_of(self.app)

    def update_strategies(self) -> None:
        runtime = self.runtime
        for task in self.app.tasks.values():
            task.Request = request_class(symbol_by_name(task.Request), runtime.end_job, runtime.stopping_cold)
        super().update_strategies()

    def create_task_handler(self, *args: Any, **options: Any) -> Callable[[Any], None]:
        self.runtime.handle = super().create_task_handler(*args, **options)
        self.runtime.message_of = self.message_of
        return self.runtime.arrived

    def message_of(self, envelope: dict[str, Any]) -> Any:
        """The message that kombu would have made, had the envelope come by the broker."""
        message = self.task_consumer.channel.message_to_python(envelope)
        message.accept = self.task_consumer.accept
        return message

    def register_with_event_loop(self, hub: Any) -> None:
        super().register_with_event_loop(hub)
        self.runtime.attach(hub)

    def on_close(self) -> None:
        """The connection is lost or the worker stops: Celery drops the requests that wait for a process. Their jobs
        are handed back, and so are messages that were claimed and not started."""
        dropped = [
            one for one in tuple(worker_state.reserved_requests) if one not in worker_state.active_requests
        ]
        super().on_close()
        for request in dropped:
            if isinstance(request, JobRequest):
                request.hand_back()
        if self.blueprint.state != RUN:
            self.runtime.hand_back_unstarted()

    # Messages that never become a request end their job here.

    def on_unknown_task(self, body: Any, message: Any, exc: Exception) -> None:
        self.runtime.refuse(message, f"the worker does not know this task: {exc}")
        super().on_unknown_task(body, message, exc)

    def on_invalid_task(self, body: Any, message: Any, exc: Exception) -> None:
        self.runtime.refuse(message, f"invalid task: {exc}")
        super().on_invalid_task(body, message, exc)

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        self.runtime.refuse(message, f"undecodable message: {exc}")
        super().on_decode_error(message, exc)

    def on_unknown_message(self, body: Any, message: Any) -> None:
        self.runtime.refuse(message, "not a task message")
        super().on_unknown_message(body, message)
