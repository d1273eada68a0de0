"""Intake of a worker: the messages that it reads from its broker.

These are the messages of its private queue, and messages of producers that know nothing of the platform. Where the
broker is not the ledger's Redis, beat's ticks come this way too.

The intake is a thread with a broker connection of its own, outside the main loop, so a full pool does not delay it. One
blocking read waits for all queues, so that an idle worker asks next to nothing. Messages of the private queue go on as
they come. Messages in the queues that the worker serves are enrolled as jobs of these queues, and acknowledged after
the commit. Messages that cannot be enrolled are set aside.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

from celery import Celery
from kombu import Consumer, Exchange, Queue
from kombu.exceptions import OperationalError
from kombu.serialization import registry
from sqlalchemy.exc import DBAPIError

from celery_capacity.routing import os_threads
from celery_capacity.routing.config.redaction import hidden_headers
from celery_capacity.routing.errors import (
    BacklogFull,
    InvalidRequest,
    LeaseLost,
    NotAccepted,
    OutcomeUnknown,
    PlatformError,
    Unsupported,
)
from celery_capacity.routing.lasting_warning import LastingWarning
from celery_capacity.routing.model.message import HEADER
from celery_capacity.routing.model.nesting import JSON, check_body, check_value
from celery_capacity.routing.model.reasons import Refusal
from celery_capacity.workers.broker import beat_messages
from celery_capacity.workers.broker.decompression import as_bytes
from celery_capacity.workers.broker.transport import raw_of, receiving
from celery_capacity.workers.membership.served_queues import ServedQueues
from celery_capacity.workers.process.service import Service
from celery_capacity.workers.submit.encode import RawMessage
from celery_capacity.workers.submit.router import Router
from celery_capacity.workers.submit.sender import Sender

#: Classes of SQLSTATEs of errors that lie in the data, so that another try meets them again.
DATA_ERRORS: Final = ("22", "23")

logger = logging.getLogger(__name__)

#: Seconds between looks at whether to stop.
LOOK_EVERY: Final = 0.5
#: Content types that are stored as they came. The depth of JSON is read off the text. Decoding pickle does anything
#: that its sender says, so it is left to the worker that runs the task.
NOT_DECODED: Final = (JSON, "application/x-python-serialize")
#: Encodings that contain ASCII.
PLAIN: Final = frozenset({"utf-8", "utf8", "ascii", "us-ascii", "binary"})
#: Encoding of ticks, whatever the encoding of tasks.
TICKS_ARE: Final = "json"
#: Seconds between tries to reach the broker.
RETRY_AFTER: Final = 0.25


class Intake(Service):
    """Thread that reads the broker.

    `on_tick` is called with the name of each tick, `on_refused` with each message that is set aside, in this thread.
    `private`: the queue of this worker alone and the receiver of its messages, where the broker is the ledger's Redis.
    Then ticks come by `workers.membership.epoch_watch`.
    """

    def __init__(
        self,
        app: Celery,
        serving: ServedQueues,
        on_tick: Callable[[str], None],
        on_refused: Callable[[Any], None] = lambda _: None,
        private: tuple[str, Callable[[Any], None]] | None = None,
    ) -> None:
        super().__init__("intake")
        self._app = app
        self._serving = serving
        #: Knows the requests of the tasks of old producers.
        self._router = Router(app.platform, lambda: app.tasks)
        self._on_tick = on_tick
        self._on_refused = on_refused
        self._private = private
        self._ending = os_threads.Event()

    def challenge(self) -> None:
        """Ask every worker for a heartbeat now."""
        with self._app.connection_for_write() as connection:
            beat_messages.publish(connection.Producer(), beat_messages.HEARTBEAT)

    def _notify(self) -> None:
        self._ending.set()

    def run(self) -> None:
        warning = LastingWarning(logger)
        while not self._ending.is_set():
            try:
                self._consume()
                warning.over()
            except self._recoverable() as error:
                warning.warn(f"intake: the broker does not answer: {error}")
                self._ending.wait(RETRY_AFTER)
            except Exception:
                # No error may make this worker deaf.
                logger.exception("intake: begins anew")
                self._ending.wait(RETRY_AFTER)

    def _recoverable(self) -> tuple[type[BaseException], ...]:
        connection = self._app.connection_for_read()
        return (*connection.connection_errors, *connection.channel_errors, OperationalError, OSError)

    def _consume(self) -> None:
        """Read the queues until the end, or until the worker serves other queues."""
        version = self._serving.version
        with self._app.connection_for_read() as connection, connection.channel() as channel:
            if self._private is not None:
                # Every message in it was admitted to this worker, and the row is durable: no acknowledgements.
                name, received = self._private
                queue = Queue(name, Exchange(""), routing_key=name, durable=False, no_declare=True)
                first = self._consumer(channel, queue, received, self._app.conf.accept_content, no_ack=True)
            else:
                first = self._consumer(channel, beat_messages.queue(), self._tick, [TICKS_ARE], no_ack=True)
            consumers = [
                first,
                *(
                    self._consumer(channel, queue, partial(self._enroll, queue.name), self._app.conf.accept_content)
                    for queue in self._serving.queues
                ),
            ]
            for consumer in consumers:
                consumer.consume()
            while not self._ending.is_set() and version == self._serving.version:
                try:
                    connection.drain_events(timeout=LOOK_EVERY)
                except TimeoutError:
                    continue

    def _consumer(
        self, channel: Any, queue: Any, on_message: Callable[[Any], None], accept: Any, no_ack: bool = False
    ) -> Any:
        return Consumer(
            channel,
            [queue],
            on_message=on_message,
            on_decode_error=partial(self._refuse, queue.name),
            no_ack=no_ack,
            accept=accept,
        )

    def _tick(self, message: Any) -> None:
        try:
            payload = message.payload
        except Exception as error:
            # Celery's decoders raise any error.
            self._refuse(beat_messages.queue().name, message, error)
            return
        name = payload.get("tick") if isinstance(payload, dict) else None
        if isinstance(name, str):
            self._on_tick(name)

    def _refuse(self, queue: str, message: Any, error: Exception | str, reason: Refusal = Refusal.UNDECODABLE) -> None:
        """Set a message aside: as it is, it can never be a job.

        It is kept under the name of the queue that was read. The routing key is its sender's choice.
        """
        receiving.set_aside(raw_of(message), queue, reason, str(error) or type(error).__name__)
        message.ack()
        self._on_refused(message)

    def _enroll(self, queue: str, message: Any) -> None:
        """Make a job of a plain message, set it aside if it cannot be a job, or leave it if it cannot be stored now."""
        try:
            enroll(self._app.amqp.job_sender, self._router, message, queue)
        except (InvalidRequest, LeaseLost, Unsupported) as error:
            # A `LeaseLost` is final too: the message says that it is a retry of an attempt that lost its lease.
            self._refuse(queue, message, error, Refusal.NO_JOB)
        except (NotAccepted, OutcomeUnknown, PlatformError) as error:
            if _lies_in_the_data(error):
                self._refuse(queue, message, error, Refusal.NO_JOB)
                return
            logger.warning("a message is left in the queue %s: %s", queue, error)
            message.requeue()
            self._ending.wait(RETRY_AFTER)
        except Exception as error:
            # A sender may write anything into headers. No use of them may end the intake.
            self._refuse(queue, message, f"no job can be made of it: {error!r}")
        else:
            message.ack()


def enroll(sender: Sender, router: Router, message: Any, queue: str) -> None:
    """Make a job of a message that came to a queue.

    The message is of protocol 1 or 2, in any content type that the configuration accepts. Raises the errors of
    `Sender.accept`, and the errors of decoding where the message cannot be read.

    A signed message (Celery's serializer `auth`) is verified here, before anything is written, and stored as it came,
    so that the worker verifies it again.
    """
    headers = message.headers if isinstance(message.headers, dict) else {}
    body = as_bytes(message.body)
    if getattr(message, "was_compressed", False):
        headers = {name: value for name, value in headers.items() if name != "compression"}
    headers, properties = hidden_headers(headers), dict(message.properties)
    is_protocol2 = "task" in headers and "id" in headers
    if message.content_type == JSON:
        check_body(body, headers.get("task"))
    if not is_protocol2 or message.content_type not in NOT_DECODED or body.lstrip()[:1] == b"{":
        payload = message.decode()
        if isinstance(payload, Mapping):
            serializer = registry.type_to_name[message.content_type]
            sender.accept(
                payload,
                headers={HEADER: router.header(payload.get("task", "")), **headers},
                serializer=serializer,
                compression=None,
                routing_key=queue,
                properties=properties,
            )
            return
        check_value(payload, headers.get("task"))
    if not is_protocol2:
        raise InvalidRequest("not a task message (protocol 1 or 2)")
    if message.content_type == JSON and str(message.content_encoding).lower() in PLAIN:
        body = with_arguments(body)
    headers = {HEADER: router.header(headers["task"]), **headers}
    encoding = message.content_encoding
    sender.accept_raw(RawMessage(body, message.content_type, encoding, headers, queue, properties))


def with_arguments(body: bytes) -> bytes:
    """Return a body of protocol 2 in JSON whose empty arguments have the form that Python writes.

    Other languages write `null` for empty arguments, and PHP writes a list for an empty map. For these Celery neither
    calls the task nor reports an error.
    """
    try:
        args, kwargs, embed = json.loads(body)
    except (ValueError, TypeError, RecursionError):
        # The worker that starts the job reports the fault of the body.
        return body
    if args is not None and kwargs is not None and kwargs != []:
        return body
    return json.dumps([args or [], kwargs or {}, embed]).encode()


def _lies_in_the_data(error: PlatformError) -> bool:
    """Return True if Postgres refuses this job whenever it is asked."""
    cause = error.__cause__
    code = getattr(cause.orig, "pgcode", None) if isinstance(cause, DBAPIError) else None
    return not isinstance(error, BacklogFull) and str(code or "")[:2] in DATA_ERRORS
