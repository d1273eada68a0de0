"""Acceptance of a job: the durable row first, then the admission. Celery's own sender gets here by `_JobProducer`."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping
from datetime import UTC, tzinfo
from typing import Any, Final, NoReturn

from kombu import serialization
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from celery_capacity.routing.config.task_rules import RERUN
from celery_capacity.routing.database import deadlines
from celery_capacity.routing.database.postgres import NOT_ALLOWED
from celery_capacity.routing.errors import (
    InvalidRequest,
    LeaseLost,
    NotAccepted,
    OutcomeUnknown,
    Unsupported,
    show,
)
from celery_capacity.routing.insert import single, successors
from celery_capacity.routing.inspect import backlog_limit
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.ledger.replies import LedgerClosed
from celery_capacity.routing.model import format_versions
from celery_capacity.routing.model import message as messages
from celery_capacity.routing.model.amounts import DEFAULT_QUEUE, LABEL
from celery_capacity.routing.model.identifiers import check_job_id, check_queue_name
from celery_capacity.routing.model.job import Inserted, NewJob, Publisher
from celery_capacity.routing.model.message import ETA, HEADER
from celery_capacity.routing.model.nesting import JSON, check_body
from celery_capacity.routing.model.request import Request
from celery_capacity.routing.model.states import FINAL, State, Store
from celery_capacity.routing.policy.placement import order
from celery_capacity.routing.recovery import resubmit
from celery_capacity.routing.store import backlog, claims
from celery_capacity.workers.dispatch.breaker import Submission
from celery_capacity.workers.dispatch.submission_queue import Beginning
from celery_capacity.workers.process import attempts, insert_errors
from celery_capacity.workers.process.attempts import Attempt
from celery_capacity.workers.process.stores import Stores
from celery_capacity.workers.submit.canvas import REPLACES
from celery_capacity.workers.submit.constraints import Rates, until_written
from celery_capacity.workers.submit.encoding import encode, to_protocol2
from celery_capacity.workers.submit.validation import (
    SameJob,
    check_name,
    check_parent,
    check_priority,
    check_time_limits,
    check_times,
    check_zoned,
    stamps_of,
)

#: Header in which Celery carries on the value that a task saw as `self.request.attempt`.
ATTEMPT_HEADER: Final = "attempt"
#: Seconds for which jobs that attempts publish are kept, without asking a Postgres that did not answer.
POSTGRES_PAUSE: Final = 2.0
#: Seconds between tries of an attempt that waits for Postgres.
AGAIN_AFTER: Final = 0.2

logger = logging.getLogger(__name__)


class Sender:
    """Sender that makes rows of Celery's messages and brings them to the ledger.

    `zone`: the zone of times that name none. `accepted`: the content types that workers read.
    """

    def __init__(
        self,
        stores: Stores,
        default_queue: str,
        zone: tzinfo = UTC,
        accepted: Collection[str] = (JSON,),
    ) -> None:
        self._stores = stores
        self._default_queue = default_queue
        self._zone = zone
        self._keep_until = 0.0
        self._accepted = accepted
        #: Rates of the tasks of the whole cluster.
        self.rates = Rates(stores)
        self._backlog = backlog_limit.BacklogLimit(self._waiting, lambda: stores.engine)

    def accept(self, body: Any, **message: Any) -> NewJob:
        """Accept a message as Celery publishes it, with the parameters of `encoded`. The job is durable on return."""
        with self._in_time():
            job = self.encoded(body, **message)
            self.store(job)
        return job

    def _in_time(self) -> deadlines.within:
        """Return the deadline within which all that one job asks Postgres ends, by the setting."""
        return deadlines.within(self._stores.settings.store_timeout)

    def encoded(
        self,
        body: Any,
        *,
        headers: Mapping[str, Any],
        serializer: str | None,
        compression: str | None,
        routing_key: str | None,
        properties: Mapping[str, Any],
    ) -> NewJob:
        """Return the job of a message, and write nothing. Raises `InvalidRequest` and `Unsupported`."""
        if isinstance(body, Mapping):
            body, headers = to_protocol2(body, headers)
        raw, content_type, content_encoding, wire = encode(body, headers, serializer, compression)
        queue = routing_key or self._default_queue
        return self.encoded_already(raw, content_type, content_encoding, wire, queue, properties)

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
        self.store(self.encoded_already(body, content_type, content_encoding, headers, queue, properties))

    def encoded_already(
        self,
        body: bytes,
        content_type: str,
        content_encoding: str,
        headers: Mapping[str, Any],
        queue: str,
        properties: Mapping[str, Any],
    ) -> NewJob:
        """Return the job of a message that is encoded already, and write nothing. Raises as `encoded` does."""
        if content_type not in self._accepted:
            # No worker of this configuration would read it.
            serializer = serialization.registry.type_to_name.get(content_type, content_type)
            raise InvalidRequest(
                f"serializer {show(serializer)} is not accepted here",
                value=serializer,
                advice="Leave it out, or name it in accept_content.",
            )
        if content_type == JSON and not headers.get("compression"):
            check_body(body, headers.get("task"))
        attempt = attempts.current()
        may_ask = attempt is None or not (attempt.deferred or time.monotonic() < self._keep_until)
        return self._job(body, content_type, content_encoding, headers, queue, properties, may_ask)

    def admits(self, attempt: Attempt | None) -> None:
        """Raise `BacklogFull` where too many jobs wait. An attempt publishes as part of a job that was accepted."""
        if attempt is None:
            self._backlog.check(self._stores.settings.max_backlog)

    def store(self, job: NewJob) -> None:
        """Make one job durable, and bring it to the ledger."""
        attempt = attempts.current()
        with self._in_time():
            self.admits(attempt)
            self.store_for(attempt, job)

    def store_for(self, attempt: Attempt | None, job: NewJob) -> None:
        """Store one job for the attempt that publishes it, and bring it to the ledger. May run in any thread."""
        began, began_ms = self._stores.sending.begin(), time.time() * 1000
        with self._in_time():
            inserted = self._insert(job) if attempt is None else self._insert_for(attempt, job)
        if inserted is None or not inserted.starts:
            return
        # For an attempt, tell the ledger at once: a worker's process may end as soon as its task has.
        self._to_ledger(job, inserted, began, began_ms, attempt is not None)

    def _job(
        self,
        body: bytes,
        content_type: str,
        content_encoding: str,
        headers: Mapping[str, Any],
        queue: str,
        properties: Mapping[str, Any],
        may_ask: bool,
    ) -> NewJob:
        settings = self._stores.settings
        wire = dict(headers)
        carried = wire.get(HEADER)
        if not isinstance(carried, Mapping):
            # An old producer, or a publish that passed no router.
            carried = {"shape": Request.from_options({}, settings.default_cpus).shape, "declared": False}
        carried = wire[HEADER] = {**carried, "format": format_versions.MESSAGE}
        request = Request.from_shape(str(carried.get("shape")))
        if queue != DEFAULT_QUEUE or LABEL in request.shape:
            request = request.within(check_queue_name(queue))
            wire[HEADER] = {**carried, "shape": request.shape}
        gates = self.rates.gates(wire, HEADER, may_ask)
        check_time_limits(wire.get("timelimit"))
        due_at, expires_at = (check_zoned(wire.get(what), what, self._zone) for what in ("eta", "expires"))
        # The broker's message is a doorbell: the row alone keeps the time, and the header tells it to the task.
        wire[HEADER].pop(ETA, None)
        eta, wire["eta"] = wire.get("eta"), None
        if eta:
            wire[HEADER][ETA] = str(eta)
        priority = check_priority(properties.get("priority"))
        # The attempt that publishes a retry or a replacement.
        publisher = wire.pop(ATTEMPT_HEADER, None)
        return NewJob(
            id=check_job_id(wire.get("id")),
            name=check_name(wire.get("task")),
            shape=request.shape,
            message=messages.encode(
                body,
                content_type=content_type,
                content_encoding=content_encoding,
                headers=wire,
                properties=_wire_properties(properties, queue, priority),
                limit=settings.max_message,
            ),
            priority=priority,
            declared=bool(carried.get("declared")),
            rerun=carried.get(RERUN) is not False,
            queue=queue,
            retries=check_times(wire.get("retries"), "retries"),
            nesting=check_times(wire.get("replaced_task_nesting"), "replaced_task_nesting"),
            publisher=publisher if isinstance(publisher, int) else None,
            root_id=check_parent(wire.get("root_id")),
            parent_id=check_parent(wire.get("parent_id")),
            replaces=check_parent(wire.get(REPLACES)),
            due_at=due_at,
            expires_at=expires_at,
            gates=gates,
            stamps=stamps_of(wire) if wire.get("stamped_headers") else None,
        )

    def _insert_for(self, attempt: Attempt, job: NewJob) -> Inserted | None:
        """Insert a job that an attempt publishes. Raises `LeaseLost` once the attempt has lost its lease.

        While Postgres is away, the job goes with the attempt's end. Where that has come already, this call waits.
        """
        if attempt.patient is not None:
            return self._insert_patiently(attempt.patient, job)
        if attempt.deferred or time.monotonic() < self._keep_until:
            attempt.keep([job])
            return None
        try:
            return self._insert(job, attempt.publisher)
        except (NotAccepted, OutcomeUnknown) as error:
            if not insert_errors.may_pass(error):
                raise
            logger.warning("Postgres is away: what job %s publishes goes with its end: %s", attempt.tag.job, error)
            self._keep_until = time.monotonic() + POSTGRES_PAUSE
            attempt.keep([job])
            return None

    def _insert_patiently(self, may_wait: Callable[[], bool], job: NewJob) -> Inserted | None:
        pause = threading.Event()
        while True:
            try:
                with deadlines.within(self._stores.settings.store_timeout, anew=True):
                    return self._insert(job)
            except (NotAccepted, OutcomeUnknown) as error:
                if not (insert_errors.may_pass(error) and may_wait()):
                    raise
            pause.wait(AGAIN_AFTER)

    def _insert(self, job: NewJob, by: Publisher | None = None) -> Inserted | None:
        """Insert the row. Returns None where the id exists, and the job is its successor or is known already."""
        try:
            return insert_errors.insert_safely(self._stores, job.id, lambda: self._insert_once(job, by))
        except SameJob as same:
            if not until_written(self._stores, same.first):
                raise
        return insert_errors.insert_safely(self._stores, job.id, lambda: self._insert_once(job, by))

    def _insert_once(self, job: NewJob, by: Publisher | None) -> Inserted | None:
        if by is None and job.gates is None:
            at_once = self._stores.inserter.insert(job)
            if at_once is not None:
                return at_once
        with self._stores.engine.connect() as connection:
            inserted = single.insert_job(connection, job, by)
            if inserted.seq is not None:
                return inserted
            if inserted.same_as is not None:
                raise SameJob(job.id, inserted.same_as)
            if by is not None and not single.may_publish(connection, by):
                self.refuse(inserted, job, by)
            # A job never retried or replaced succeeds nothing, and a role that only submits may not change a row.
            prior_state = successors.put_successor(connection, job) if job.retries or job.nesting else None
            if prior_state == State.REPLACED:
                # The attempt ended long ago. This is the last step of its replacement, and the row goes on with it.
                if job.due_at is None:
                    self._bring(connection, job.id, inserted)
            elif prior_state is not None:
                # The row knows the successor already. The ledger is told to save a detour.
                self.ask(inserted, lambda ledger: ledger.note_successor(job.id, job.message))
            else:
                self._known(connection, job, inserted)
        return None

    def refuse(self, inserted: Inserted, job: NewJob, by: Publisher) -> NoReturn:
        """Raise `LeaseLost`: an attempt that lost its lease publishes nothing."""
        self.ask(inserted, lambda ledger: ledger.count("stale.publish"))
        raise LeaseLost(
            f"attempt {by.attempt} of job {by.job} lost its lease: what it publishes, {job.id} ({job.name}), is refused"
        )

    def _known(self, connection: Any, job: NewJob, inserted: Inserted) -> None:
        """Handle an existing id that gets no successor: a repeated, a late or a stale publish."""
        row = successors.identity_of(connection, job.id)
        if row is None:
            return
        if job.publisher is not None and job.publisher < row.attempt:
            raise LeaseLost(
                f"attempt {job.publisher} of job {job.id} lost its lease to attempt {row.attempt}: what it publishes "
                "under the job's id is refused"
            )
        if row.state in FINAL and (row.retries, row.nesting) < (job.retries, job.nesting):
            if job.nesting > row.nesting and attempts.current() is not None:
                # The job was revoked before the last step of its replacement, say. The step before is not to blame.
                logger.warning("job %s has ended as %s, the last step of its replacement is dropped", job.id, row.state)
                return
            raise Unsupported(
                f"task id {job.id} has ended as {row.state}; it cannot be published again as a successor",
                value=job.id,
                advice="Use a new task_id.",
            )
        if row.state == State.ACCEPTED:
            # The job never reached the ledger, or came back from there. Submit the row, not this publish.
            self._bring(connection, job.id, inserted)

    def _bring(self, connection: Any, job: str, inserted: Inserted) -> None:
        """Submit the row to the ledger as it is."""
        try:
            rows = backlog.these(connection, [job])
        except DBAPIError as error:
            if getattr(error.orig, "pgcode", None) != NOT_ALLOWED:
                raise
            # A role that only submits may not read messages: the sweep brings the job.
            return
        self.ask(inserted, lambda ledger: resubmit.submit_rows(ledger, rows))

    def _waiting(self) -> int | None:
        """Return the number of jobs that wait in the ledger. None where it does not say."""
        return self._stores.sending.ask(lambda ledger: backlog_limit.waiting_in_ledger(ledger.client))

    def _to_ledger(self, job: NewJob, inserted: Inserted, began: Beginning, began_ms: float, alone: bool) -> None:
        """Admit or file a job. An error here leaves an accepted row, which the sweep brings in."""
        if inserted.seq is None:
            return
        if inserted.authority != Store.LEDGER:
            self._wake_pullers()
            return
        place, now_ms = order(job.priority, inserted.seq), round(time.time() * 1000)
        args = (job.id, job.shape, place, job.message, 0, 0, now_ms, began_ms, job.rerun)
        self._stores.sending.add(Submission(inserted.epoch, args, len(job.message)), began, alone=alone)

    def ask(self, inserted: Inserted, question: Callable[[Ledger], object]) -> bool:
        """Ask the ledger, in the epoch that this insert confirmed. Returns True if it answered.

        The duties bring in a job that the ledger does not hear of or take. Where Postgres decides, wake those who take
        jobs there instead.
        """
        if inserted.authority != Store.LEDGER:
            self._wake_pullers()
            return False

        def asked(ledger: Ledger) -> object:
            ledger.epoch = inserted.epoch
            return question(ledger)

        try:
            return self._stores.sending.ask(asked) is not None
        except LedgerClosed:
            # The ledger is cold, or of another epoch: a worker opens it, and brings in the accepted jobs.
            return False

    def _wake_pullers(self) -> None:
        try:
            with self._stores.engine.connect() as connection:
                claims.wake(connection)
        except SQLAlchemyError as error:
            # The workers look by themselves, a little later.
            logger.info("the workers were not told of a job: %s", error)


def _wire_properties(properties: Mapping[str, Any], queue: str, priority: int) -> dict[str, Any]:
    """Return the properties of a message as Celery's consumer expects them."""
    return {
        "correlation_id": properties.get("correlation_id"),
        "reply_to": properties.get("reply_to"),
        "delivery_mode": 2,
        "delivery_info": {"exchange": "", "routing_key": queue},
        "priority": priority,
    }
