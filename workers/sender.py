"""Accepting a job: the durable row first, then the admission. Behind Celery's own sender, which calls `publish`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import UTC, datetime, tzinfo
from typing import Any, Final

from kombu import compression as compressors
from kombu import serialization
from kombu.exceptions import EncodeError
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from routing import backlog, enroll, store
from routing import message as messages
from routing.errors import (
    InvalidRequest,
    LeaseLost,
    NotAccepted,
    OutcomeUnknown,
    StoreUnavailable,
    Unsupported,
    mask_url,
    show,
)
from routing.names import check_job_id
from routing.policy import TOP_PRIORITY, order
from routing.replies import LedgerClosed
from routing.request import Request
from routing.states import FINAL, State
from routing.store import Inserted, NewJob
from workers.router import HEADER
from workers.stores import Stores

#: Where Celery carries on what a task saw as self.request.attempt.
ATTEMPT_HEADER: Final = "attempt"
#: Seconds for which a sender leaves a ledger alone that did not answer: its jobs stay accepted until the sweep.
LEDGER_PAUSE: Final = 5.0


class Sender:
    """Makes rows of Celery's messages and brings them to the ledger. `zone`: that of times which name none."""

    def __init__(self, stores: Stores, default_queue: str, zone: tzinfo = UTC) -> None:
        self._stores = stores
        self._default_queue = default_queue
        self._zone = zone
        self._pause_until = 0.0

    def accept(
        self,
        body: Any,
        *,
        headers: Mapping[str, Any],
        serializer: str | None,
        compression: str | None,
        routing_key: str | None,
        properties: Mapping[str, Any],
    ) -> None:
        """Accept a message as Celery publishes it. When this returns, the job is durable."""
        if isinstance(body, Mapping):
            raise Unsupported("task protocol 1 is not supported yet", advice="Leave task_protocol at 2.")
        try:
            content_type, content_encoding, payload = serialization.dumps(
                body, serializer=serializer or "json"
            )
        except EncodeError as error:
            raise InvalidRequest(
                f"the arguments of {headers.get('task')} cannot be written as {serializer or 'json'}: {error}",
                value=headers.get("argsrepr"),
                advice="Pass text, numbers, lists and dicts, or a reference (a path, a key) to the data.",
            ) from error
        raw = payload.encode(content_encoding) if isinstance(payload, str) else bytes(payload)
        wire = dict(headers)
        if compression:
            raw, wire["compression"] = compressors.compress(raw, compression)
        self.accept_raw(
            raw, content_type, content_encoding, wire, routing_key or self._default_queue, properties
        )

    def accept_raw(
        self,
        body: bytes,
        content_type: str,
        content_encoding: str,
        headers: Mapping[str, Any],
        queue: str,
        properties: Mapping[str, Any],
    ) -> None:
        """Accept a message that is encoded already."""
        if queue != self._default_queue:
            raise Unsupported(
                f"queue {show(queue)}: routing by queue is not supported yet",
                value=queue,
                advice="Leave the queue out, and say what the task needs: cpus=, memory=, resources={...}.",
            )
        job = self._job(body, content_type, content_encoding, headers, queue, properties)
        began_ms = time.time() * 1000
        inserted = self._insert(job)
        if inserted is None or job.due_at is not None:
            return
        self._to_ledger(job, inserted, began_ms)

    def _job(
        self,
        body: bytes,
        content_type: str,
        content_encoding: str,
        headers: Mapping[str, Any],
        queue: str,
        properties: Mapping[str, Any],
    ) -> NewJob:
        settings = self._stores.settings
        wire = dict(headers)
        carried = wire.get(HEADER)
        if not isinstance(carried, Mapping):
            # An old producer, or a publish that passed no router.
            carried = {"shape": Request.from_options({}, settings.default_cpus).shape, "declared": False}
            wire[HEADER] = carried
        request = Request.from_shape(str(carried["shape"]))
        due_at, expires_at = (_time(wire.get(what), what, self._zone) for what in ("eta", "expires"))
        # The broker's message is a doorbell: the time is kept by the row alone.
        wire["eta"] = None
        priority = _priority(properties.get("priority"))
        # Of a retry or a replacement: the attempt that publishes it.
        publisher = wire.pop(ATTEMPT_HEADER, None)
        wire_properties = {
            "correlation_id": properties.get("correlation_id"),
            "reply_to": properties.get("reply_to"),
            "delivery_mode": 2,
            "delivery_info": {"exchange": "", "routing_key": queue},
            "priority": priority,
        }
        return NewJob(
            id=check_job_id(wire.get("id")),
            name=_name(wire.get("task")),
            shape=request.shape,
            message=messages.encode(
                body,
                content_type=content_type,
                content_encoding=content_encoding,
                headers=wire,
                properties=wire_properties,
                limit=settings.max_message,
            ),
            priority=priority,
            declared=bool(carried.get("declared")),
            queue=queue,
            retries=int(wire.get("retries") or 0),
            nesting=int(wire.get("replaced_task_nesting") or 0),
            publisher=publisher if isinstance(publisher, int) else None,
            root_id=_parent(wire.get("root_id")),
            parent_id=_parent(wire.get("parent_id")),
            due_at=due_at,
            expires_at=expires_at,
        )

    def _insert(self, job: NewJob) -> Inserted | None:
        """The durable insert. None where the id belongs to a job that runs, and this is its successor (or known)."""
        try:
            inserted = self._insert_once(job)
        except (OperationalError, DBAPIError) as error:
            if not error.connection_invalidated:
                raise NotAccepted(f"Postgres refused job {job.id}: {mask_url(str(error.orig))}") from error
            # The connection was lost around the commit. The same statement on a new connection is safe: a row that
            # is there already is left as it is.
            try:
                inserted = self._insert_once(job)
            except PoolTimeout as again:
                raise OutcomeUnknown(job.id) from again
            except DBAPIError as again:
                raise OutcomeUnknown(job.id) from again
        except PoolTimeout as error:
            raise NotAccepted(f"no connection to Postgres was free for job {job.id}") from error
        return inserted

    def _insert_once(self, job: NewJob) -> Inserted | None:
        with self._stores.engine.connect() as connection:
            inserted = store.insert_job(connection, job)
            if inserted.seq is not None:
                return inserted
            self._stores.ledger.epoch = inserted.epoch
            succeeds = store.put_successor(connection, job) is not None
            try:
                if succeeds:
                    self._stores.ledger.succeed(job.id)
                else:
                    self._known(connection, job)
            except StoreUnavailable:
                # The row knows; the ledger only spares it a detour.
                self._pause_until = time.monotonic() + LEDGER_PAUSE
            except LedgerClosed:
                # Cold, or of another epoch: whoever opens it reads the row.
                return None
        return None

    def _known(self, connection: Any, job: NewJob) -> None:
        """The id exists and this is no successor: the same publish again, one that comes too late, or a stale one."""
        row = store.identity_of(connection, job.id)
        if row is None:
            return
        if job.publisher is not None and job.publisher < row.attempt:
            raise LeaseLost(
                f"attempt {job.publisher} of job {job.id} lost its lease to attempt {row.attempt}: what it publishes "
                "under the job's id is refused"
            )
        if row.state in FINAL and (row.retries, row.nesting) < (job.retries, job.nesting):
            raise Unsupported(
                f"task id {job.id} has ended as {row.state}; it cannot be published again as a successor",
                value=job.id,
                advice="Use a new task_id.",
            )
        if row.state == State.ACCEPTED:
            # It never reached the ledger, or came back from there: what goes now is the row, not this publish.
            enroll.submit_rows(self._stores.ledger, backlog.these(connection, [job.id]))

    def _to_ledger(self, job: NewJob, inserted: Inserted, began_ms: float) -> None:
        """Admit or file. Whatever goes wrong here leaves a row that is accepted, which the sweep brings in."""
        if inserted.authority != "ledger" or inserted.seq is None or time.monotonic() < self._pause_until:
            return
        try:
            ledger = self._stores.ledger
            ledger.epoch = inserted.epoch
            ledger.submit(
                job.id,
                job.shape,
                order(job.priority, inserted.seq),
                job.message,
                submitted_ms=round(time.time() * 1000),
                read_ms=began_ms,
            )
        except StoreUnavailable:
            self._pause_until = time.monotonic() + LEDGER_PAUSE
        except LedgerClosed:
            # Cold, or of another epoch: a worker opens it, and brings in what is accepted.
            return


def _priority(value: Any) -> int:
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= TOP_PRIORITY:
        raise InvalidRequest(f"priority {show(value)} is not valid", value=value, advice="It must be 0 to 9, 9 first.")
    return value


def _parent(value: Any) -> str | None:
    """The id of another task, as Celery passes it on."""
    return None if value is None else check_job_id(value)


def _time(value: Any, what: str, zone: tzinfo) -> datetime | None:
    if value is None:
        return None
    try:
        when = datetime.fromisoformat(str(value))
    except ValueError as error:
        raise InvalidRequest(
            f"{what} {show(value)} is not a time", value=value, advice="Pass a datetime or ISO 8601 text."
        ) from error
    return when if when.tzinfo is not None else when.replace(tzinfo=zone)


def _name(value: Any) -> str:
    if not isinstance(value, str) or not value or len(value) > 255 or not value.isprintable():
        raise InvalidRequest(
            f"task name {show(value)} is not valid",
            value=value,
            advice="It must be 1 to 255 printable characters.",
        )
    return value
