"""What a worker hears besides its own queue: beat's ticks, and messages of producers that know nothing of the platform.

A thread with a broker connection of its own, outside the main loop: a full pool does not delay it. Messages in the
default queue are enrolled as jobs and acknowledged after the commit; those that cannot be are set aside.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any, Final

from celery import Celery
from kombu import Consumer
from kombu.exceptions import OperationalError
from sqlalchemy.exc import DBAPIError

from routing.errors import (
    BacklogFull,
    InvalidRequest,
    LeaseLost,
    NotAccepted,
    OutcomeUnknown,
    PlatformError,
    Unsupported,
)
from routing.secrets import hidden_headers
from workers import ticks
from workers.transport import raw_of, receiving

#: Of SQLSTATEs: the classes of errors that lie in the data, and will lie there the next time.
DATA_ERRORS: Final = ("22", "23")

logger = logging.getLogger(__name__)

#: Seconds between looks at whether to stop.
LOOK_EVERY: Final = 0.5
#: Seconds between tries to reach the broker.
RETRY_AFTER: Final = 1.0


class Intake(threading.Thread):
    """`on_tick` is called with the name of each tick, `on_refused` with each message that is set aside, in this
    thread."""

    def __init__(
        self, app: Celery, on_tick: Callable[[str], None], on_refused: Callable[[Any], None] = lambda _: None
    ) -> None:
        super().__init__(name="intake", daemon=True)
        self._app = app
        self._on_tick = on_tick
        self._on_refused = on_refused
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
                # Whatever it was, it must not make this worker deaf.
                logger.exception("intake: begins anew")
                self._ending.wait(RETRY_AFTER)

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

    def _consumer(self, channel: Any, queues: list[Any], on_message: Callable[[Any], None], *, no_ack: bool) -> Any:
        return Consumer(
            channel,
            queues=queues,
            on_message=on_message,
            on_decode_error=self._refuse,
            no_ack=no_ack,
            accept=["json"],
        )

    def _tick(self, message: Any) -> None:
        try:
            payload = message.payload
        except Exception as error:
            # Celery's decoders raise what they like.
            self._refuse(message, error)
            return
        name = payload.get("tick") if isinstance(payload, dict) else None
        if isinstance(name, str):
            self._on_tick(name)

    def _refuse(self, message: Any, error: Exception | str) -> None:
        """Set a message aside: as it is, it can never be a job."""
        delivery = getattr(message, "delivery_info", None) or {}
        queue = str(delivery.get("routing_key") or self._app.conf.task_default_queue)
        receiving.set_aside(raw_of(message), queue, str(error) or type(error).__name__)
        message.ack()
        self._on_refused(message)

    def _enroll(self, message: Any) -> None:
        """Make a job of a plain message. One that cannot be one is set aside; one that cannot be stored now is left."""
        headers = message.headers
        if not isinstance(headers, dict) or "task" not in headers or "id" not in headers:
            self._refuse(message, "not a task message (protocol 2)")
            return
        try:
            body = message.body.encode() if isinstance(message.body, str) else bytes(message.body)
            if getattr(message, "was_compressed", False):
                headers = {name: value for name, value in headers.items() if name != "compression"}
            self._app.amqp.job_sender.accept_raw(
                body,
                message.content_type,
                message.content_encoding,
                hidden_headers(headers),
                self._app.conf.task_default_queue,
                dict(message.properties),
            )
        except (InvalidRequest, LeaseLost, Unsupported) as error:
            # (What says that it is a retry, of an attempt that is not the job's any more, is no less final.)
            self._refuse(message, error)
        except (NotAccepted, OutcomeUnknown, PlatformError) as error:
            if _lies_in_the_data(error):
                self._refuse(message, error)
                return
            logger.warning("a message is left in the default queue: %s", error)
            message.requeue()
            self._ending.wait(RETRY_AFTER)
        except Exception as error:
            # Headers are whatever somebody wrote into them; no use of theirs may end the intake.
            self._refuse(message, f"no job can be made of it: {error!r}")
        else:
            message.ack()


def _lies_in_the_data(error: PlatformError) -> bool:
    """Whether Postgres refuses this job whenever it is asked."""
    cause = error.__cause__
    code = getattr(cause.orig, "pgcode", None) if isinstance(cause, DBAPIError) else None
    return not isinstance(error, BacklogFull) and str(code or "")[:2] in DATA_ERRORS
