"""Transports by which a worker takes messages from a broker, so that no message can end it.

kombu decodes each message of a queue and lets every error out into the loop that reads the queue. So a raw `garbage`,
`[]` or `null`, pushed by anybody, ends a Celery worker. Here a channel looks first: it sets an unreadable message aside
(`Receiving.set_aside`), and the loop goes on. Bodies are decompressed up to a bound.

`Connection` stands in for kombu's on an installed app. `redis://`, `sentinel://`, `amqp://` and the others mean what
they always do, with our classes behind them.
"""

from __future__ import annotations

import json
import logging
import socket
import sys
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from queue import Empty
from typing import Any, Final

import kombu
from kombu import message as kombu_message
from kombu.transport import pyamqp, virtual
from kombu.transport import redis as kombu_redis
from kombu.utils.encoding import bytes_to_str
from redis.backoff import NoBackoff
from redis.exceptions import DataError, ResponseError
from redis.retry import Retry

from celery_capacity.routing import redis_commands
from celery_capacity.routing.config import redis_urls
from celery_capacity.routing.ledger import sentinels
from celery_capacity.routing.model import envelope as envelopes
from celery_capacity.routing.model.envelope import Envelope, Unreadable
from celery_capacity.routing.model.reasons import Refusal
from celery_capacity.workers.broker.decompression import TIMES, unpack
from celery_capacity.workers.broker.held_headers import held_headers
from celery_capacity.workers.process.spare_connections import close_spare

logger = logging.getLogger(__name__)


def _drop(raw: bytes, queue: str, _: Refusal, detail: str) -> None:
    logger.error("a message in the queue %.100s cannot be read and is dropped: %s: %r", queue, detail, raw[:200])


@dataclass
class Receiving:
    """Rules of this process for received messages. A worker sets them at its start.

    `set_aside` gets (raw, queue, reason, detail). `most_bytes`: of a decompressed body.
    """

    set_aside: Callable[[bytes, str, Refusal, str], None] = _drop
    most_bytes: int = TIMES * 1024**2


#: Rules of the process in one object, since kombu makes channels and messages by itself.
receiving: Final = Receiving()


class _Unpacked(kombu_message.Message):
    """Message whose body is decompressed here, up to the bound. kombu would do that without a bound."""

    was_compressed = False  # True if the headers speak of a compression that the body no longer has

    def __init__(self, body: Any = None, *args: Any, headers: Any = None, **options: Any) -> None:
        method = headers.get("compression") if isinstance(headers, dict) else None
        if not method:
            super().__init__(body, *args, headers=headers, **options)
            return
        try:
            body = unpack(body, method, receiving.most_bytes)
            self.was_compressed = True
        except Exception:
            # Like in kombu, the handler of the message finds the error there.
            self.errors = [sys.exc_info()]
        super().__init__(body, *args, headers={**headers, "compression": None}, **options)
        self.headers = headers


class Message(virtual.Message, _Unpacked):
    """A message of a Redis queue; `_raw` is the `Envelope` that it was made of."""


class JobMessage(Message):
    """Message of this worker's own queue: its row is durable, so that nobody waits for an acknowledgement.

    A body that cannot be decompressed is no error of the message, because its job must be claimed before it can end.
    `spoiled` has that error for the starter of the job. `revoked`: the claim said that the job was revoked.
    """

    revoked = False

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.spoiled: BaseException | None = self.errors[0][1] if self.errors else None
        self.errors = []
        self.headers = held_headers(self.headers, self.delivery_tag)

    def ack(self, multiple: bool = False) -> None:
        self._state = "ACK"

    def reject(self, requeue: bool = False) -> None:
        self._state = "REJECTED"

    def requeue(self) -> None:
        self._state = "REQUEUED"


class _NoChannel:
    """Stand-in for the channel of a message that came by none."""

    no_ack_consumers: Any = None
    decode_body = virtual.Channel.decode_body
    codecs = virtual.Channel.codecs


def job_message(raw: bytes, accept: Any) -> JobMessage:
    """Return the message of a job that came from the private queue without the broker. Raises `Unreadable`."""
    envelope = envelopes.read(raw)
    try:
        message = JobMessage(envelope, channel=_NoChannel())
    except Exception as error:
        raise Unreadable.of(error) from error
    message.accept = accept
    return message


def replied_message(text: str, accept: Any) -> JobMessage:
    """Return the message of a job that came in a reply of the ledger, claimed already.

    An unreadable message has nothing but its tag, so that its job ends as undecodable.
    """
    raw = text.encode("utf-8", "replace")
    try:
        return job_message(raw, accept)
    except Unreadable as error:
        properties = {"delivery_tag": envelopes.tag_at_end(raw), "delivery_info": {}}
        message = JobMessage({"properties": properties}, channel=_NoChannel())
        message.spoiled = error
        return message


def raw_of(message: Any) -> bytes:
    """Return the bytes of a message as they came, or else its known parts, for the quarantine."""
    envelope = getattr(message, "_raw", None)
    if isinstance(envelope, Envelope) and envelope.raw:
        return envelope.raw
    shown = {"headers": getattr(message, "headers", None), "body": getattr(message, "body", None)}
    return json.dumps(shown, default=repr, ensure_ascii=False).encode("utf-8", "backslashreplace")


def digest_of(message: Any) -> str:
    """Return the digest of a message by `routing.model.envelope.digest`; '' where its bytes are not known."""
    envelope = getattr(message, "_raw", None)
    return envelopes.digest(envelope) if isinstance(envelope, Envelope) and envelope.raw else ""


#: Seconds for which the server waits for a message before it says that there is none. By kombu's own 1 s each worker
#: would ask every second.
WAIT: Final = 60

#: Redis channels of this process. Threads that end take theirs out.
_channels: Final[weakref.WeakSet[Any]] = weakref.WeakSet()


def _channels_now() -> list[Any]:
    """Return the Redis channels of this process. Other threads may make one meanwhile."""
    while True:
        with suppress(RuntimeError):
            return list(_channels)


def doubt() -> None:
    """Reconnect every connection that waits for a message of Redis. May run in any thread.

    The server was away, and a connection that has waited since then may wait for ever. Shut down their sockets, so that
    their readers notice.
    """
    for channel in _channels_now():
        for name in ("client", "subclient"):
            connection = getattr(channel.__dict__.get(name), "connection", None)
            sock = getattr(connection, "_sock", None)
            if sock is not None:
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)


def close_spare_connections() -> None:
    """Close the connections on which the channels of this process do not wait. May run in any thread."""
    for channel in _channels_now():
        for pool in (getattr(channel, "_pool", None), getattr(channel, "_async_pool", None)):
            if pool is not None:
                close_spare(pool)


class _CheckedReads:
    """Channel mixin that validates raw messages before kombu decodes them, and sets unreadable ones aside."""

    Message = Message
    # Attributes of kombu's channel that are used here.
    connection: Any
    connection_errors: Any
    client: Any
    qos: Any
    sep: str
    _fanout_queues: Any
    _flush_brpop_reauth: Any
    _in_poll: Any
    _queue_cycle: Any
    #: Number of the connection at the server, and the socket that had it.
    _waits_as: int | None = None
    _waits_on: Any = None

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        _channels.add(self)

    def _brpop_start(self, timeout: Any = None) -> None:
        sock = self.client.connection._sock
        if sock is not None and sock is not self._waits_on:
            self._waits_on, self._waits_as = sock, None
            with suppress(ResponseError):
                self.client.connection.send_command("CLIENT", "ID")
                self._waits_as = int(self.client.parse_response(self.client.connection, "CLIENT ID"))
        super()._brpop_start(timeout)  # type: ignore[misc]

    def close(self) -> None:
        """Close, and wait no more for a message, without losing one that comes just now."""
        if self._in_poll:
            try:
                with self.conn_or_acquire() as client:  # type: ignore[attr-defined]
                    client.client_unblock(self._waits_as)
            except (*self.connection_errors, ResponseError, DataError):
                self._in_poll.disconnect()
                self._in_poll = None
        super().close()  # type: ignore[misc]

    def basic_consume(self, queue: Any, no_ack: bool, callback: Any, consumer_tag: Any, **options: Any) -> Any:
        consumed = super().basic_consume(queue, no_ack, callback, consumer_tag, **options)  # type: ignore[misc]
        kind = JobMessage if no_ack and queue not in self._fanout_queues else Message

        def deliver(raw: Any) -> Any:
            try:
                envelope = raw if isinstance(raw, Envelope) else envelopes.checked(raw)
                message = kind(envelope, channel=self)
            except Exception as error:
                came = raw.raw if isinstance(raw, Envelope) else json.dumps(raw, default=repr).encode()
                unreadable = Unreadable.of(error)
                receiving.set_aside(came, queue, unreadable.reason, str(unreadable))
                return None
            message.read_from = queue
            if not no_ack:
                self.qos.append(message, message.delivery_tag)
            return callback(message)

        self.connection._callbacks[queue] = deliver
        return consumed

    def queue_purge(self, queue: str, **options: Any) -> int:
        count: int = super().queue_purge(queue, **options)  # type: ignore[misc]
        return count + _purge_jobs(self, queue)

    def _brpop_read(self, **options: Any) -> bool:
        """Read a message as kombu does, but check it before it is delivered."""
        try:
            try:
                popped = self.client.parse_response(self.client.connection, "BRPOP", **options)
            except self.connection_errors:
                # After the disconnect the next round connects again.
                self.client.connection.disconnect()
                raise
            if not popped:
                raise Empty()
            key, raw = popped
            queue = bytes_to_str(key).rsplit(self.sep, 1)[0]
            self._queue_cycle.rotate(queue)
            self._take(queue, raw)
            return True
        finally:
            self._in_poll = None
            self._flush_brpop_reauth()

    def _take(self, queue: str, raw: Any) -> None:
        raw = raw.encode("utf-8", "surrogateescape") if isinstance(raw, str) else bytes(raw)
        try:
            envelope = envelopes.read(raw)
        except Unreadable as error:
            receiving.set_aside(raw, queue, error.reason, str(error))
            return
        self.connection._deliver(envelope, queue)


class _NoRetries:
    """Mixin that leaves retries to Celery: redis-py makes ten, with pauses of up to 10 s, in the main loop."""

    def _connparams(self, *args: Any, **options: Any) -> Any:
        parameters = super()._connparams(*args, **options)  # type: ignore[misc]
        return {**redis_commands.DRIVER, **parameters, "retry": Retry(NoBackoff(), 0)}


class Channel(_NoRetries, _CheckedReads, kombu_redis.Channel):
    """Channel of a Redis."""


class SentinelChannel(_NoRetries, _CheckedReads, kombu_redis.SentinelChannel):
    """Channel of a Redis behind Sentinels."""

    connection_class = sentinels.PrimaryConnection
    sentinel_kwargs = sentinels.asking()


def _purge_jobs(channel: Any, queue: str) -> int:
    """End the waiting jobs of a purged queue, and return how many. 0 where the app is not on the platform."""
    purge = getattr(channel.connection.client, "purge_jobs", None)
    return purge(queue) if purge is not None else 0


class Transport(kombu_redis.Transport):
    """Transport of `redis://`, `rediss://` and `redis+socket://`."""

    Channel = Channel
    brpop_timeout = WAIT


class SentinelTransport(kombu_redis.SentinelTransport):
    """Transport of `sentinel://`."""

    Channel = SentinelChannel
    brpop_timeout = WAIT


class AMQPMessage(pyamqp.Message, _Unpacked):
    """Message of RabbitMQ."""


class AMQPChannel(pyamqp.Channel):
    Message = AMQPMessage

    def queue_purge(self, queue: str = "", *more: Any, **options: Any) -> int:
        count: int = super().queue_purge(queue, *more, **options) or 0
        return count + _purge_jobs(self, queue)


class AMQPConnection(pyamqp.Connection):
    Channel = AMQPChannel


class AMQPTransport(pyamqp.Transport):
    """Transport of `amqp://`."""

    Connection = AMQPConnection


class AMQPSTransport(pyamqp.SSLTransport):
    """Transport of `amqps://`."""

    Connection = AMQPConnection


#: kombu's transport -> ours.
OURS: Final[dict[type, type]] = {
    kombu_redis.Transport: Transport,
    kombu_redis.SentinelTransport: SentinelTransport,
    pyamqp.Transport: AMQPTransport,
    pyamqp.SSLTransport: AMQPSTransport,
}


class Connection(kombu.Connection):
    """Connection of kombu's with our transports.

    It takes `master_name` from a URL of Sentinels, where kombu has an option.
    """

    def __init__(self, hostname: Any = "localhost", *args: Any, transport_options: Any = None, **options: Any) -> None:
        if isinstance(hostname, str) and hostname.startswith(f"{redis_urls.SENTINEL}://"):
            address = redis_urls.read(hostname)
            named = {redis_urls.MASTER: address.master} if address.master else {}
            transport_options = {**named, **(transport_options or {})}
            hostname = replace(address, master="").url
        super().__init__(hostname, *args, transport_options=transport_options, **options)

    #: Set by the app: ends the jobs in the backlog of a queue that is purged, and returns how many.
    purge_jobs: Callable[[str], int] | None = None
    #: Set by a worker's consumer on its own connection, because other threads read the queues.
    consumes_nothing: bool = False

    def clone(self, **options: Any) -> Connection:
        clone: Connection = super().clone(**options)
        clone.purge_jobs = self.purge_jobs
        return clone

    def get_transport_cls(self) -> type:
        transport_class: type = super().get_transport_cls()
        return OURS.get(transport_class, transport_class)
