"""Put messages that were set aside back where they came from, once something has changed that made them unreadable.

For example workers were upgraded, a task was added, or a constraint in Postgres was mended. A message goes back into
its queue as it came. A transition is written again by the code that writes all others. No harm comes of an old message.
A job is identified by its id and its retries, and an attempt by its token. A worker that still cannot read the message
sets it aside once more.

A message leaves the quarantine in the transaction around its way back, and the transaction is committed last. If a
store fails between the two, the message is in both places. It is never in none.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Any, Final

from celery import Celery
from kombu.exceptions import OperationalError
from kombu.transport import redis as kombu_redis
from redis.exceptions import RedisError
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from celery_capacity.routing.database.authority import read_authority
from celery_capacity.routing.database.postgres_errors import is_locked, one_line, translated
from celery_capacity.routing.errors import InvalidRequest, PlatformError, StoreUnavailable
from celery_capacity.routing.ledger import keys
from celery_capacity.routing.ledger.replies import LedgerClosed
from celery_capacity.routing.model.states import Store
from celery_capacity.routing.model.token import Token
from celery_capacity.routing.recovery import resubmit, transition_log
from celery_capacity.routing.store import quarantine, refused_transitions
from celery_capacity.routing.store.job_transitions import Applied
from celery_capacity.routing.store.quarantine import MAX_BYTES, SetAside
from celery_capacity.workers.process.stores import Stores, transactions

logger = logging.getLogger(__name__)

#: Members of a message that `transport.raw_of` kept only in part: no worker can read it.
_PARTS: Final = {"headers", "body"}
#: Members of an outbox that was set aside.
_OUTBOX: Final = {"job", "token", "outbox"}
#: Most by which the clocks of Redis and Postgres differ.
MAX_CLOCK_DIFFERENCE: Final = timedelta(minutes=1)
#: Errors in data that this release cannot read.
_UNREADABLE: Final = (ValueError, TypeError, LookupError, AttributeError, RecursionError)


class Became(StrEnum):
    """Result for one message; the value is the word in JSON."""

    #: it is in its queue, or its transition is written
    REQUEUED = "requeued"
    #: there is no such message
    UNKNOWN = "unknown"
    #: it may lack its end
    CUT = "cut"
    #: only its headers and its body were kept
    PARTS = "parts-only"
    #: it came by the private queue of a worker that has ended
    WORKER_GONE = "worker-gone"
    #: it came by a queue that nobody serves
    NO_QUEUE = "unknown-queue"
    #: it is no transition for this release
    UNREADABLE = "still-unreadable"
    #: Postgres refuses it still
    REFUSED = "still-refused"
    #: its job is in the archive, and another job has its id
    OTHER_JOB = "other-job"
    #: somebody keeps the row of its job locked
    LOCKED = "job-locked"
    #: a store did not answer, for this message or one before it
    STORE_AWAY = "store-away"
    #: its job has gone on, so it changes nothing
    OVERTAKEN = "out-of-date"


@dataclass(frozen=True, slots=True)
class Requeued:
    """A message that was to be put back, and what became of it. `detail`: why it stays in the quarantine, else ''."""

    message: int
    became: Became
    detail: str = ""

    @property
    def done(self) -> bool:
        return self.became is Became.REQUEUED

    def to_json(self) -> dict[str, Any]:
        return {"id": self.message, "result": self.became.value, "detail": self.detail or None}


class _Stays(Exception):
    """A message stays in the quarantine. It ends the transaction that took the message out."""

    def __init__(self, became: Became, detail: str) -> None:
        super().__init__(detail)
        self.became = became


def requeue(app: Celery, stores: Stores, messages: Sequence[int]) -> Iterator[Requeued]:
    """Put messages back where they came from, and yield what became of each.

    A store may not answer. Then that message and those behind it stay in the quarantine; the message that was on its
    way may be in its queue as well. Raises `StoreUnavailable` where that is the first message.
    """
    has_result, away = False, ""
    for message in dict.fromkeys(messages):
        if away:
            yield Requeued(message, Became.STORE_AWAY, away)
            continue
        try:
            with (
                translated(f"message {message} was not put back: "),
                transactions(stores.engine).begin() as connection,
            ):
                became, applied = _put_back(app, stores, connection, message)
        except _Stays as stays:
            yield Requeued(message, stays.became, str(stays))
        except StoreUnavailable as error:
            if not has_result:
                raise
            away = str(error)
            yield Requeued(message, Became.STORE_AWAY, away)
        else:
            _go_on(stores, applied)
            yield Requeued(message, became)
        has_result = True


def _go_on(stores: Stores, applied: Sequence[Applied]) -> None:
    """Start the jobs that may start after these transitions. Where a store does not answer, the next sweep does it."""
    if not applied:
        return
    try:
        with stores.engine.connect() as connection:
            authority = read_authority(connection)
        if authority.authority == Store.LEDGER:
            stores.ledger.epoch = authority.epoch
            resubmit.go_on(stores.engine, stores.ledger, applied)
    except (LedgerClosed, PlatformError, RedisError, DBAPIError) as error:
        logger.info("jobs that go on after a transition are left to the next sweep: %s", error)


def _put_back(app: Celery, stores: Stores, connection: Connection, message: int) -> tuple[Became, Sequence[Applied]]:
    """Put a message back; return what became of it, and the rows that its transition changed."""
    kept = quarantine.take(connection, message)
    if kept is None:
        return Became.UNKNOWN, ()
    if len(kept.raw) >= MAX_BYTES:
        raise _Stays(Became.CUT, f"only its first {MAX_BYTES} bytes were kept: let its program send it again")
    if kept.is_transition:
        return Became.REQUEUED, _write_again(connection, kept)
    if _is_served(app, connection, kept.queue):
        _to_broker(app, kept)
    elif fnmatchcase(kept.queue, keys.PRIVATE_QUEUES):
        _to_worker(stores, kept)
    else:
        raise _Stays(Became.NO_QUEUE, f"nobody serves its queue: start a worker with -Q {kept.queue}")
    return Became.REQUEUED, ()


# -- messages


def _is_served(app: Celery, connection: Connection, queue: str) -> bool:
    configured = queue == app.conf.task_default_queue or queue in app.amqp.queues
    return configured or quarantine.is_served(connection, queue)


def _to_broker(app: Celery, kept: SetAside) -> None:
    """Push a message into its queue at Celery's broker, behind all others, with the bytes that came."""
    with app.connection_for_write() as broker:
        if not isinstance(broker.transport, kombu_redis.Transport) or _has_parts_alone(kept.raw):
            detail = "only its headers and its body were kept: let its program send it again"
            raise _Stays(Became.PARTS, detail)
        errors = (*broker.connection_errors, *broker.channel_errors, OperationalError, OSError, RedisError)
        try:
            with broker.channel() as channel, channel.conn_or_acquire() as client:
                client.lpush(kept.queue, kept.raw)
        except errors as error:
            raise StoreUnavailable(f"the broker does not take the message: {error}") from error


def _has_parts_alone(raw: bytes) -> bool:
    try:
        content = json.loads(raw)
    except _UNREADABLE:
        return False
    return isinstance(content, dict) and content.keys() == _PARTS


def _to_worker(stores: Stores, kept: SetAside) -> None:
    """Push a message into the private queue of a worker that still has it.

    The worker may end at this moment. Then a duty removes the queue (`workers.retention.former_workers`).
    """
    name = kept.queue.removeprefix("worker.").rpartition(".")[0]
    client = stores.ledger.client
    try:
        queue: Any = client.hget(keys.book(name), "queue")
        if queue != kept.queue.encode():
            detail = "its worker has ended, and its queue with it: a job is delivered again from its row, so drop this"
            raise _Stays(Became.WORKER_GONE, detail)
        client.lpush(kept.queue, kept.raw)
    except InvalidRequest as error:
        raise _Stays(Became.NO_QUEUE, str(error)) from error
    except RedisError as error:
        raise StoreUnavailable(f"Redis does not take the message: {error}") from error


# -- transitions


def _write_again(connection: Connection, kept: SetAside) -> list[Applied]:
    """Write a transition or an outbox into the row of its job; return the rows that changed."""
    try:
        applied = _write(connection, json.loads(kept.raw), kept.seen_at)
    except DBAPIError as error:
        if is_locked(error):
            raise _Stays(Became.LOCKED, "somebody keeps the row of its job locked: try it again later") from error
        if refused_transitions.concerns_data(error):
            raise _Stays(Became.REFUSED, f"Postgres refuses it still: {one_line(error)}") from error
        raise
    except _UNREADABLE as error:
        # The text of such an error may have the whole message.
        raise _Stays(Became.UNREADABLE, f"this release cannot read it: {type(error).__name__}") from error
    if applied is None:
        detail = "its job has gone on without it, and it changes nothing: drop it, or retry the job"
        raise _Stays(Became.OVERTAKEN, detail)
    return applied


def _write(connection: Connection, fields: Any, seen_at: datetime | None) -> list[Applied] | None:
    if fields.keys() == _OUTBOX:
        _check_job(connection, fields["job"], seen_at)
        token = Token.parse(fields["token"])
        return refused_transitions.deliver_again(connection, fields["job"], token, fields["outbox"])
    if "token" in fields:
        transition = refused_transitions.read_back(fields)
    else:
        entry = {name.encode(): str(value).encode() for name, value in fields.items()}
        transition = transition_log.parse(b"", entry)
    _check_job(connection, transition.job, seen_at, transition.at_ms)
    return refused_transitions.apply_again(connection, transition)


def _check_job(connection: Connection, job: Any, seen_at: datetime | None, at_ms: int = 0) -> None:
    """Check that the job is older than the end of its attempt, and than the row of the quarantine."""
    if not isinstance(job, str):
        raise TypeError("the id of the job is no text")
    moments = [] if seen_at is None else [seen_at]
    if at_ms:
        # The clock of Redis may be behind that of Postgres, by which jobs are submitted.
        moments.append(datetime.fromtimestamp(at_ms / 1000, UTC) + MAX_CLOCK_DIFFERENCE)
    if moments and not refused_transitions.is_about(connection, job, min(moments)):
        detail = "its job is in the archive, and another job has its id: drop this"
        raise _Stays(Became.OTHER_JOB, detail)
