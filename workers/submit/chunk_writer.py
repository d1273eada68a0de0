"""Storing of many jobs: a chunk of rows in one statement, then into the ledger.

While a thread brings one chunk to the ledger, another thread stores the next one, and the caller builds the one after
that. There are never more than these three. Chunks come to the ledger in their order. Where the caller may be slow to
build a chunk, a thread stores its jobs after 50 ms, and again every 50 ms, until it finds no new job.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any, Final, TypeVar

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

#: Seconds after which an incomplete chunk is stored: a delay that nobody notices.
MAX_AGE: Final = 0.05

T = TypeVar("T")

#: Callback once a job is stored, which sends a signal of Celery's. None where nobody listens.
After = Callable[[], None] | None


#: Takes stored jobs to the ledger: the jobs, their committed rows, and the time at which their storing began (ms).
Bring = Callable[[Sequence[NewJob], Committed, float], None]


class _SomeExist(Exception):
    """Signal that some jobs of a chunk have a row already, so that nothing was written."""


class ChunkWriter:
    """Jobs on their way into Postgres and the ledger, a chunk at a time.

    All methods but `_store`, `_store_aged` and what these call run in the caller's thread. `done` is called with the
    number of stored jobs. `within` writes the jobs into the caller's own transaction instead, in the caller's thread.
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
        #: True: a chunk is stored once it is `MAX_AGE` old. For jobs that come from code which may wait.
        self.ages = False
        self._jobs: list[NewJob] = []
        self._after: list[After] = []
        #: Held while the chunk that is built is changed.
        self._building = threading.Lock()
        #: Two threads: one stores, the other brings stored jobs to the ledger.
        self._threads: ThreadPoolExecutor | None = None
        #: The chunk that is being stored, with its callbacks.
        self._storing: Future[list[After]] | None = None
        #: The stored chunk that is being brought to the ledger.
        self._bringing: Future[None] | None = None
        #: The work that stores chunks every `MAX_AGE`, and the callbacks of its chunks that were not called yet.
        self._aging: Future[None] | None = None
        self._aged: list[After] = []
        #: True once that work found no job, and ends.
        self._aging_ends = False
        #: Set to leave the chunk that is built to the caller.
        self._left = threading.Event()
        #: Number of stored jobs.
        self.accepted = 0
        #: Ids of jobs whose commit was not confirmed: they may be stored.
        self.unknown: tuple[str, ...] = ()
        #: True once a chunk was not stored. Then no other chunk is stored.
        self.failed = False

    def add(self, job: NewJob, after: After = None) -> None:
        """Add a job, and store the chunk once it is full. Raises the error of an earlier chunk."""
        with self._building:
            self._jobs.append(job)
            self._after.append(after)
        if len(self._jobs) < self._size:
            if self.ages:
                self._age()
            return
        if self._within is not None:
            self.flush()
            return
        self._wait()
        chunk = self._taken()
        if not chunk[0]:
            # A thread has just stored this chunk because of its age.
            return
        self._storing = self._submit(self._store, *chunk, self._hand_on)
        if self._storing is None:
            self._tell(self._store(*chunk))

    def flush(self) -> None:
        """Store all jobs that were added."""
        self._wait()
        while self._jobs:
            self._tell(self._store(*self._taken()))
        self._await_ledger()

    def _taken(self) -> tuple[list[NewJob], list[After]]:
        with self._building:
            chunk = self._jobs, self._after
            self._jobs, self._after = [], []
        return chunk

    def _submit(self, work: Callable[..., T], *arguments: Any) -> Future[T] | None:
        """Have a thread do some work. None where it cannot: the caller does it."""
        try:
            self._threads = self._threads or ThreadPoolExecutor(2, "bulk")
            return self._threads.submit(work, *arguments)
        except RuntimeError:
            # The interpreter ends, or the system has no thread for us. Cancel the executor's work.
            if self._threads is not None:
                self._threads.shutdown(wait=False, cancel_futures=True)
            self._threads, self.ages = None, False
            return None

    def _age(self) -> None:
        """Have a thread store the chunk once it is `MAX_AGE` old, whatever the caller does meanwhile."""
        if self._aging is not None and (self._aging_ends or self._aging.done()):
            # Raise its error before more jobs come.
            self._wait()
        self._tell_aged()
        if self._aging is None:
            self._aging_ends = False
            self._aging = self._submit(self._store_aged, self._storing)

    def _store_aged(self, before: Future[list[After]] | None) -> None:
        """Store the built jobs every `MAX_AGE`, until no job was added meanwhile or the caller takes over.

        `before`: the full chunk that is being stored. Its jobs come first. Where it fails, no other job is stored.
        """
        if before is not None:
            wait([before])
        while not self._left.wait(MAX_AGE) and not self.failed:
            after = self._store(*self._taken())
            with self._building:
                self._aged += after
                # A job that is added later finds this set, and starts the work anew.
                self._aging_ends = not self._jobs
            if self._aging_ends:
                return

    @property
    def stand(self) -> bool:
        """Return True if some jobs stay stored, or may stay, whatever else happens."""
        return self._within is None and bool(self.accepted or self.unknown)

    def close(self) -> None:
        """Wait for the chunk that is being stored. Jobs that were not flushed are not stored."""
        self._left.set()
        if self._threads is not None:
            self._threads.shutdown()

    def _wait(self) -> None:
        """Wait for the chunk that is being stored, and stop storing chunks because of their age."""
        storing, self._storing = self._storing, None
        aging, self._aging = self._aging, None
        if storing is not None:
            self._tell(storing.result())
        if aging is not None:
            self._left.set()
            try:
                aging.result()
            finally:
                self._left.clear()
                self._tell_aged()

    def _tell_aged(self) -> None:
        with self._building:
            stored, self._aged = self._aged, []
        if stored:
            self._tell(stored)

    def _tell(self, stored: list[After]) -> None:
        for after in stored:
            if after is not None:
                after()
        if self._done is not None:
            self._done(self.accepted)

    # -- storing -------------------------------------------------------------------------------------------------

    def _store(self, jobs: list[NewJob], after: list[After], bring: Bring | None = None) -> list[After]:
        """Store a chunk, and return its callbacks. `bring`: takes the stored jobs; by default this thread does."""
        try:
            if jobs:
                self._store_chunk(jobs, bring or self._bring)
        except BaseException:
            self.failed = True
            raise
        return after

    def _store_chunk(self, jobs: list[NewJob], bring: Bring) -> None:
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
            bring(jobs, committed, began_ms)

    def _bring(self, jobs: Sequence[NewJob], committed: Committed, began_ms: float) -> None:
        """Bring stored jobs to the ledger, behind those that were stored before."""
        self._await_ledger()
        to_ledger(self._sender, jobs, committed, began_ms)

    def _hand_on(self, jobs: Sequence[NewJob], committed: Committed, began_ms: float) -> None:
        """Have the other thread bring stored jobs to the ledger, once it is done with those before."""
        self._await_ledger()
        self._bringing = self._submit(to_ledger, self._sender, jobs, committed, began_ms)
        if self._bringing is None:
            to_ledger(self._sender, jobs, committed, began_ms)

    def _await_ledger(self) -> None:
        """Wait until the ledger has the chunk that is being brought to it, and raise its error."""
        bringing, self._bringing = self._bringing, None
        if bringing is not None:
            bringing.result()

    def _store_singly(self, jobs: Sequence[NewJob]) -> None:
        self._await_ledger()
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
    went = sender.open_keys(jobs)
    rows = [ledger_row(job, committed.seqs[job.id], now, began_ms) for job in jobs if job.starts or job.id in went]
    confirmed = Inserted(None, committed.epoch, committed.authority)
    for start in range(0, len(rows), resubmit.CHUNK):
        if not sender.ask(confirmed, partial(Ledger.submit_many, rows=rows[start : start + resubmit.CHUNK])):
            return
