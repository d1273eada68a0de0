"""What a worker hears besides its own queue: beat's ticks, and messages of producers that know nothing of the platform.

A thread with a broker connection of its own, outside the main loop: a full pool does not delay it. Messages in the
default queue are enrolled as jobs and acknowledged after the commit.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any, Final

from celery import Celery
from kombu import Consumer
from kombu.exceptions import OperationalError

from routing.errors import InvalidRequest, NotAccepted, OutcomeUnknown, PlatformError, Unsupported
from workers import ticks

logger = logging.getLogger(__name__)

#: Seconds between looks at whether to stop.
LOOK_EVERY: Final = 0.5
#: Seconds between tries to reach the broker.
RETRY_AFTER: Final = 1.0


class Intake(threading.Thread):
    """`on_tick` is called with the name of each tick, in this thread."""

    def __init__(self, app: Celery, on_tick: Callable[[str], None]) -> None:
        super().__init__(name="intake", daemon=True)
        self._app = app
        self._on_tick = on_tick
        self._ending = threading.Event()

    def challenge(self) -> None:
        """Ask every worker for a heartbeat now."""
        with self._app.connection_for_write() as connection:
            ticks.publish(connection.Producer(), ticks.HEARTBEAT)

    def stop(self, within: float) -> None:
        self._ending.set()
        if self.is_alive():
            self.join(within)

    def run(self) -> None:
        said = ""
        while not self._ending.is_set():
            try:
                self._consume()
                said = ""
            except self._recoverable() as error:
                if str(error) != said:
                    said = str(error)
                    logger.warning("intake: the broker does not answer: %s", error)
                self._ending.wait(RETRY_AFTER)
            except Exception:
                # One message that nobody can read (it was taken from the queue already) must not make this worker deaf.
                logger.exception("intake: a message could not be read and is set aside")

    def _recoverable(self) -> tuple[type[BaseException], ...]:
        connection = self._app.connection_for_read()
        return (*connection.connection_errors, *connection.channel_errors, OperationalError, OSError)

    def _consume(self) -> None:
        queues = list(self._app.amqp.queues.consume_from.values())
        with self._app.connection_for_read() as connection, connection.channel() as channel:
            consumers = [
                self._consumer(channel, [ticks.queue()], self._tick, no_ack=True),
                self._consumer(channel, queues, self._enroll, no_ack=False),
            ]
            for consumer in consumers:
                consumer.consume()
            while not self._ending.is_set():
                try:
                    connection.drain_events(timeout=LOOK_EVERY)
                except TimeoutError:
                    continue

    def _consumer(
        self, channel: Any, queues: list[Any], on_message: Callable[[Any], None], *, no_ack: bool
    ) -> Any:
        return Consumer(channel, queues=queues, on_message=on_message, no_ack=no_ack, accept=["json"])

    def _tick(self, message: Any) -> None:
        payload = message.payload
        name = payload.get("tick") if isinstance(payload, dict) else None
        if isinstance(name, str):
            self._on_tick(name)

    def _enroll(self, message: Any) -> None:
        """Make a job of a plain message. One that cannot be one is set aside; one that cannot be stored now is left."""
        headers = message.headers
        if not isinstance(headers, dict) or "task" not in headers or "id" not in headers:
            logger.error(
                "a message in the default queue is not a task message (protocol 2) and is set aside: %.200r",
                headers,
            )
            message.ack()
            return
        body = message.body.encode() if isinstance(message.body, str) else bytes(message.body)
        try:
            self._app.amqp.job_sender.accept_raw(
                body,
                message.content_type,
                message.content_encoding,
                headers,
                self._app.conf.task_default_queue,
                dict(message.properties),
            )
        except (InvalidRequest, Unsupported, ValueError, TypeError) as error:
            logger.error("message %s in the default queue is set aside: %s", headers.get("id"), error)
            message.ack()
        except (NotAccepted, OutcomeUnknown, PlatformError) as error:
            logger.warning("message %s is left in the default queue: %s", headers.get("id"), error)
            message.requeue()
            self._ending.wait(RETRY_AFTER)
        else:
            message.ack()
