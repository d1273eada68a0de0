"""Acceptance of a job in three steps: message → job (`encode`), job → row (the inserter), row → ledger (`dispatch`).

The row is durable before the ledger hears of it. Celery's own sender gets here by `_JobProducer`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from datetime import UTC, tzinfo
from typing import Any, NoReturn

from sqlalchemy.exc import SQLAlchemyError

from celery_capacity.routing.database import deadlines
from celery_capacity.routing.errors import LeaseLost
from celery_capacity.routing.insert import single
from celery_capacity.routing.inspect import backlog_limit
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.ledger.replies import LedgerClosed
from celery_capacity.routing.model.job import Existing, Inserted, NewJob, Publisher
from celery_capacity.routing.model.nesting import JSON
from celery_capacity.routing.model.reasons import Refusal
from celery_capacity.routing.model.states import Store
from celery_capacity.routing.recovery import resubmit
from celery_capacity.routing.store import backlog, claims, controls
from celery_capacity.routing.store.backlog import Pending
from celery_capacity.workers.dispatch.breaker import Submission, ledger_row
from celery_capacity.workers.dispatch.submission_queue import Beginning
from celery_capacity.workers.process import attempts
from celery_capacity.workers.process.attempts import Attempt
from celery_capacity.workers.process.stores import Stores
from celery_capacity.workers.process.when_away import RowWriter
from celery_capacity.workers.submit.constraints import Rates, until_written
from celery_capacity.workers.submit.encode import Encoder, RawMessage
from celery_capacity.workers.submit.validation import SameJob
from celery_capacity.workers.traces import publishing

logger = logging.getLogger(__name__)


class Sender:
    """Sender of one app's jobs. `zone`, `accepted`: as the `Encoder` has them."""

    def __init__(
        self,
        stores: Stores,
        default_queue: str,
        zone: tzinfo = UTC,
        accepted: Collection[str] = (JSON,),
    ) -> None:
        self._stores = stores
        #: Rates of the tasks of the whole cluster.
        self.rates = Rates(stores)
        self.rows = RowWriter(stores)
        self.encoder = Encoder(stores, self.rates, self._may_ask, default_queue, zone, accepted)
        self._backlog = backlog_limit.BacklogLimit(self._waiting, lambda: stores.engine)
        self._tenants = backlog_limit.TenantLimit(lambda: stores.engine)

    def accept(self, body: Any, **message: Any) -> NewJob:
        """Accept a message as Celery publishes it, with the parameters of `Encoder.encode`.

        The job is durable on return.
        """
        with self.in_time(), publishing.sending(self._stores.settings, body, message) as traced:
            job = self._encode(body, **traced)
            self.store(job, attempts.current())
        return job

    def accept_raw(self, message: RawMessage) -> None:
        """Accept a message that is encoded already."""
        with self.in_time():
            job = self.encoder.job_of(message)
            self.check_backlog(attempts.current(), job.shape)
            self.store(job, attempts.current())

    def encode(self, body: Any, **message: Any) -> NewJob:
        """Return the job of a message, and write nothing. Raises as `Encoder.encode` does, and `BacklogFull`."""
        with publishing.sending(self._stores.settings, body, message, "create") as traced:
            return self._encode(body, **traced)

    def _encode(self, body: Any, **message: Any) -> NewJob:
        job = self.encoder.encode(body, **message)
        self.check_backlog(attempts.current(), job.shape)
        return job

    def in_time(self) -> deadlines.within:
        """Return the deadline for all questions of one job to Postgres, by the setting `store_timeout`."""
        return deadlines.within(self._stores.settings.store_timeout)

    def check_backlog(self, attempt: Attempt | None, shape: str) -> None:
        """Raise `BacklogFull` where too many jobs wait, of all or of the shape's tenant.

        An attempt publishes as part of a job that was accepted.
        """
        if attempt is None:
            self._tenants.check(shape)
            self._backlog.check(self._stores.settings.max_backlog)

    def store(self, job: NewJob, attempt: Attempt | None) -> None:
        """Make a job durable, and bring it to the ledger. `attempt`: the attempt that publishes it. In any thread.

        An error after the insert leaves an accepted row, which the sweep brings in.
        """
        sending = self._stores.sending
        began, began_ms = sending.begin(), time.time() * 1000
        with self.in_time():
            inserted = self.rows.write(lambda: self._insert(job, attempt), [job], attempt)
            if inserted is not None and inserted.seq is None:
                self._tell_of_existing(job, inserted, attempt)
        if inserted is not None:
            self.bring(job, inserted, began, began_ms, alone=attempt is not None)

    def bring(self, job: NewJob, inserted: Inserted, began: Beginning, began_ms: float, *, alone: bool = False) -> None:
        """Bring an inserted job to the ledger, or wake the workers that take jobs in Postgres, if it may start now.

        `began`, `began_ms`: the start of the submission, by `sending.begin` and by the clock. `alone`: tell the ledger
        at once.
        """
        if inserted.seq is None or not inserted.starts:
            return
        if inserted.authority != Store.LEDGER:
            self._wake_pullers()
            return
        row = ledger_row(job, inserted.seq, round(time.time() * 1000), began_ms)
        # For an attempt, tell the ledger at once: a worker's process may end as soon as its task has.
        self._stores.sending.add(Submission(inserted.epoch, row, len(job.message)), began, alone=alone)

    def open_keys(self, jobs: Sequence[NewJob]) -> set[str]:
        """Let those of these stored jobs go that their limits by key let start now; return their ids.

        Others that go in their place are due, and a duty brings them. So it does with these, after an error here.
        """
        limited = [job for job in jobs if job.key_limits is not None]
        if not limited:
            return set()
        try:
            with self._stores.engine.connect() as connection:
                return single.open_keys(connection, limited)
        except SQLAlchemyError as error:
            logger.info("%d jobs with limits by key are let go a little later: %s", len(limited), error)
            return set()

    def refuse(self, inserted: Inserted, job: NewJob, by: Publisher) -> NoReturn:
        """Raise `LeaseLost`: an attempt that lost its lease publishes nothing."""
        self.ask(inserted, lambda ledger: ledger.count(Refusal.STALE_PUBLISH))
        raise LeaseLost(
            f"attempt {by.token.attempt} of job {by.job} lost its lease: what it publishes, {job.id} ({job.name}), is"
            " refused"
        )

    def ask(self, inserted: Inserted, question: Callable[[Ledger], object]) -> bool:
        """Ask the ledger, in the epoch that this insert confirmed. Returns True if it answered.

        Where the ledger does not answer, or refuses the job, the duties bring the job in. Where Postgres decides, wake
        the workers that take jobs there instead.
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

    def _may_ask(self) -> bool:
        return self.rows.may_ask(attempts.current())

    def _waiting(self) -> int | None:
        """Return the number of jobs that wait in the ledger. None where it does not say."""
        return self._stores.sending.ask(backlog_limit.waiting_in_ledger)

    def _insert(self, job: NewJob, attempt: Attempt | None) -> Inserted:
        """Insert the row of a job. Raises `SameJob` where another job has its key, and as `Inserter.insert`."""
        # A patient attempt has ended, and its lease with it.
        by = attempt.publisher if attempt is not None and attempt.patient is None else None
        inserted = self._stores.inserter.insert(job, by, tolerant=attempt is not None)
        if inserted.same_as is not None and until_written(self._stores, inserted.same_as):
            inserted = self._stores.inserter.insert(job, by, tolerant=attempt is not None)
        if inserted.same_as is not None:
            raise SameJob(job.id, inserted.same_as)
        return inserted

    def _tell_of_existing(self, job: NewJob, inserted: Inserted, attempt: Attempt | None) -> None:
        """Tell the ledger what became of a publish under an existing id. Raises `LeaseLost`."""
        if inserted.existing is Existing.STALE and attempt is not None:
            self.refuse(inserted, job, attempt.publisher)
        if inserted.existing is Existing.SUCCESSOR:
            # The row knows the successor already. The ledger is told to save a detour.
            self.ask(inserted, lambda ledger: ledger.note_successor(job.id, job.message))
        elif inserted.existing is Existing.ACCEPTED:
            self._submit_row(job.id, inserted)

    def _submit_row(self, job: str, inserted: Inserted) -> None:
        """Submit an accepted row to the ledger as it is."""
        try:
            with self._stores.engine.connect() as connection:
                rows = backlog.these(connection, [job])
        except SQLAlchemyError as error:
            # A role that only submits may not read messages, for one. The sweep brings the job.
            logger.info("job %s is brought to the ledger a little later: %s", job, error)
            return
        if self.ask(inserted, lambda ledger: resubmit.submit_rows(ledger, rows)):
            self._move_reprioritized(rows, inserted)

    def _move_reprioritized(self, rows: Sequence[Pending], inserted: Inserted) -> None:
        """Move submitted jobs whose priority changed after their rows were read.

        The program that changed it may have looked for the job in the ledger before the job was there.
        """
        try:
            with self._stores.engine.connect() as connection:
                ranked = controls.ranked(connection, [row.id for row in rows])
        except SQLAlchemyError as error:
            logger.info("priorities of %d jobs are compared by the next reconcile: %s", len(rows), error)
            return
        changed = [ranked[row.id] for row in rows if row.id in ranked and ranked[row.id].priority != row.priority]
        if changed:
            moves = [(row.job, row.order, row.behind or "") for row in changed]
            self.ask(inserted, lambda ledger: ledger.reprioritize(moves))

    def _wake_pullers(self) -> None:
        try:
            with self._stores.engine.connect() as connection:
                claims.wake(connection)
        except SQLAlchemyError as error:
            # The workers look by themselves, a little later.
            logger.info("the workers were not told of a job: %s", error)
