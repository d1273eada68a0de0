"""Storing of many jobs: a chunk of rows in one statement, then into the ledger.

While a thread stores one chunk, the caller builds the next one. There are never more than these two.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Final

from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from celery_capacity.routing.database import deadlines
from celery_capacity.routing.errors import NotAccepted, OutcomeUnknown, mask_url
from celery_capacity.routing.insert import bulk, single
from celery_capacity.routing.insert.bulk import Committed
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.model.job import Inserted, NewJob
from celery_capacity.routing.recovery import resubmit
from celery_capacity.workers.dispatch.breaker import ledger_row
from celery_capacity.workers.process.attempts import Attempt
from celery_capacity.workers.process.stores import Stores
from celery_capacity.workers.submit.sender import Sender

logger = logging.getLogger(__name__)

#: Bytes of messages that one `store_timeout` is long enough for, at a few MB a second.
BYTES_IN_LIMIT: Final = 32 * 1024**2

#: Callback once a job is stored, which sends a signal of Celery's. None where nobody listens.
After = Callable[[], None] | None


class _SomeExist(Exception):
    """Signal that some jobs of a chunk have a row already, so that nothing was written."""


class Chunks:
    """Jobs on their way into Postgres and the ledger, a chunk at a time.

    All methods but `_store` run in the caller's thread. `done` is called with the number of stored jobs. `within`
    writes the jobs into the caller's own transaction instead, in the caller's thread.
    """

    def __init__(
        self,
        sender: Sender,
        stores: Stores,
        attempt: Attempt | None,
        size: int = bulk.CHUNK,
        done: Callable[[int], object] | None = None,
        within: Callable[[Sequence[NewJob]], None] | None = None,
    ) -> None:
        self._sender = sender
        self._stores = stores
        self._attempt = attempt
        self._size = size
        self._done = done
        self._within = within
        self._jobs: list[NewJob] = []
        self._after: list[After] = []
        self._thread: ThreadPoolExecutor | None = None
        self._storing: Future[None] | None = None
        self._stored: list[After] = []
        #: Number of stored jobs.
        self.accepted = 0
        #: Ids of jobs of which it is not known whether they are stored.
        self.unknown: tuple[str, ...] = ()
        #: True once a chunk was not stored. Then no other chunk is stored.
        self.failed = False

    def add(self, job: NewJob, after: After = None) -> None:
        """Add a job, and store the chunk once it is full. Raises the error of an earlier chunk."""
        self._jobs.append(job)
        self._after.append(after)
        if len(self._jobs) < self._size:
            return
        if self._within is not None:
            self.flush()
        else:
            self._wait()
            jobs = self._taken()
            try:
                self._thread = self._thread or ThreadPoolExecutor(1, "bulk")
                self._storing = self._thread.submit(self._store, jobs)
            except RuntimeError:
                # The interpreter ends, or the system has no thread for us. Cancel the executor's work, and store here.
                if self._thread is not None:
                    self._thread.shutdown(wait=False, cancel_futures=True)
                self._thread = None
                self._store(jobs)
                self._tell()

    def flush(self) -> None:
        """Store all jobs that were added."""
        self._wait()
        while self._jobs:
            self._store(self._taken())
            self._tell()

    def _taken(self) -> list[NewJob]:
        jobs, self._jobs = self._jobs, []
        self._stored, self._after = self._after, []
        return jobs

    @property
    def stand(self) -> bool:
        """Return True if some jobs stay stored, or may stay, whatever else happens."""
        return self._within is None and bool(self.accepted or self.unknown)

    def close(self) -> None:
        """Wait for the chunk that is being stored. Jobs that were not flushed are not stored."""
        if self._thread is not None:
            self._thread.shutdown()

    def _wait(self) -> None:
        """Wait for the chunk that is being stored."""
        storing, self._storing = self._storing, None
        if storing is not None:
            storing.result()
            self._tell()

    def _tell(self) -> None:
        for after in self._stored:
            if after is not None:
                after()
        if self._done is not None:
            self._done(self.accepted)

    # -- storing -------------------------------------------------------------------------------------------------

    def _store(self, jobs: list[NewJob]) -> None:
        try:
            self._store_chunk(jobs)
        except BaseException:
            self.failed = True
            raise

    def _store_chunk(self, jobs: list[NewJob]) -> None:
        if self._within is not None:
            self._within(jobs)
            self.accepted += len(jobs)
            return
        attempt, began_ms = self._attempt, time.time() * 1000
        if any(job.constraints is not None for job in jobs):
            # A job's constraints are written with its row, one job at a time.
            self._store_singly(jobs)
            return
        limits = 1 + sum(len(job.message) for job in jobs) // BYTES_IN_LIMIT
        seconds = self._stores.settings.store_timeout * min(limits, deadlines.LONG)
        try:
            with deadlines.within(seconds), deadlines.patiently(seconds):
                committed = self._sender.rows.write(lambda: self._copy(jobs), jobs, attempt)
        except _SomeExist:
            # Store job by job: an existing row is left as it is, or gets its successor.
            self._store_singly(jobs)
            return
        self.accepted += len(jobs)
        if committed is not None:
            to_ledger(self._sender, jobs, committed, began_ms)

    def _store_singly(self, jobs: Sequence[NewJob]) -> None:
        for job in jobs:
            self._sender.store(job, self._attempt)
            self.accepted += 1

    def _copy(self, jobs: Sequence[NewJob]) -> Committed:
        """Make the rows durable, and try once more on another connection where the first connection broke.

        Raises `_SomeExist`, and writes nothing, where an id exists.
        """
        try:
            return self._copy_rows(jobs)
        except PoolTimeout as error:
            raise NotAccepted(f"no connection to Postgres was free for {len(jobs)} jobs") from error
        except DBAPIError as error:
            if bulk.is_known(error):
                raise _SomeExist from error
            if not error.connection_invalidated or deadlines.unsent(error):
                raise NotAccepted(f"Postgres refused {len(jobs)} jobs: {mask_url(str(error.orig))}") from error
            self._stores.inserter.doubt_connections()
        # The connection was lost around the commit. A second try is safe: it fails for ids that exist by now.
        try:
            return self._copy_rows(jobs)
        except (DBAPIError, PoolTimeout) as error:
            if isinstance(error, DBAPIError) and bulk.is_known(error):
                raise _SomeExist from error
            self.unknown = tuple(job.id for job in jobs)
            message = f"the connection broke while {len(jobs)} jobs were stored; they may have been accepted"
            raise OutcomeUnknown(jobs[0].id, message) from error

    def _copy_rows(self, jobs: Sequence[NewJob]) -> Committed:
        engine, attempt = self._stores.engine, self._attempt
        if attempt is None:
            with engine.connect() as connection:
                bulk.copy_jobs(connection, jobs)
                return bulk.committed(connection, jobs)
        with engine.execution_options(isolation_level="READ COMMITTED").begin() as connection:
            kept = bulk.copy_jobs(connection, jobs, attempt.publisher)
        with engine.connect() as connection:
            if kept:
                return bulk.committed(connection, jobs)
            confirmed = single.confirmed(connection)
        return self._sender.refuse(confirmed, jobs[0], attempt.publisher)


def to_ledger(sender: Sender, jobs: Sequence[NewJob], committed: Committed, began_ms: float) -> None:
    """Admit or file jobs in order, whose rows were written after `began_ms`.

    An error here leaves accepted rows, which the sweep brings in.
    """
    now = round(time.time() * 1000)
    rows = [ledger_row(job, committed.seqs[job.id], now, began_ms) for job in jobs if job.due_at is None]
    confirmed = Inserted(None, committed.epoch, committed.authority)
    for start in range(0, len(rows), resubmit.CHUNK):
        if not sender.ask(confirmed, partial(Ledger.submit_many, rows=rows[start : start + resubmit.CHUNK])):
            return
