"""Open a new epoch on a cold ledger: one that never was open, was emptied, or came back with old books.

One process does it. It begins the epoch in Postgres, by one guarded statement, and reports meanwhile that it goes on.
Where it falls silent, another process begins the next epoch, and every further step of the first one is refused. Books
come first. Each worker that Postgres takes for alive gets a closed book with the jobs that it runs by Postgres. So none
of its capacity is free before the worker has reported. The workers see the new epoch, register and report what they
hold. Then the backlog is filed, in its order.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Final

from redis.exceptions import RedisError
from sqlalchemy import Connection, Engine, text

from celery_capacity.routing.config import timeouts
from celery_capacity.routing.database.authority import (
    Authority,
    begin_epoch,
    change_pause,
    count_from_now,
    end_opening,
    hold_epoch,
    opening_term,
    read_authority,
    still_opens,
)
from celery_capacity.routing.errors import StoreUnavailable
from celery_capacity.routing.ledger import keys, snapshot
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.ledger.repair import control_groups
from celery_capacity.routing.ledger.replies import Adopted, LedgerClosed
from celery_capacity.routing.model.capacity import Capacity
from celery_capacity.routing.model.request import filed_shape
from celery_capacity.routing.model.states import FINAL, HOLDING, Store, WorkerStatus
from celery_capacity.routing.model.token import NO_ATTEMPT, Token
from celery_capacity.routing.policy.placement import order
from celery_capacity.routing.recovery import reconcile, refill, resubmit, revocation, transition_log
from celery_capacity.routing.recovery.controls import entries
from celery_capacity.routing.store import backlog, claims, controls
from celery_capacity.routing.store.backlog import Pending, in_doubt

logger = logging.getLogger(__name__)

BACKLOG_CHUNK: Final = 1000
#: Carried jobs that are let in in one step: some 1 ms of the server.
CARRIED_CHUNK: Final = 200
#: Keys removed in one step.
WIPE_CHUNK: Final = 500
#: Keys that a new epoch keeps. An entry leaves the stream when Postgres has it, and not before.
_KEPT: Final = (
    *(keys.EPOCH, keys.COUNTERS, keys.RECONCILED, keys.DECLARATIONS, keys.DECLARED_TIMES),
    *(keys.STREAM, keys.RUNNER, keys.ASKED),
)


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """Result of a rebuild. `workers`: books written; `held`: jobs entered into them; `filed`: jobs brought back."""

    epoch: int
    workers: int
    held: int
    filed: int


def open_if_cold(engine: Engine, ledger: Ledger) -> Rebuilt | None:
    """Open the next epoch when the ledger is cold, or its opener has died, failed or fallen silent.

    Return None where there is nothing to do, or another process does it.
    """
    # Before anything is closed: the books may be those of another database.
    ledger.own_database()
    with engine.connect() as connection:
        authority = read_authority(connection)
        if authority.age == 0:
            count_from_now(connection)
        if not _is_wanting(authority, ledger):
            return None
        # A ledger that cannot be written cannot be opened, and needs no new epoch.
        ledger.probe()
        opened, whole = ledger.opened(), ledger.has_whole_stream()
        term = opening_term(ledger.settings.renew_interval)
        epoch = begin_epoch(connection, authority.epoch, term, above=opened[0] if opened else 0)
        began_ms = claims.now_ms(connection)
    return None if epoch is None else Opener(engine, ledger, epoch, term, began_ms, whole).run()


def _is_wanting(current: Authority, ledger: Ledger) -> bool:
    """Return whether the ledger is to decide and has to be opened."""
    if current.authority != Store.LEDGER or current.age < change_pause(ledger.settings.confirm_interval):
        return False
    return _is_old(current, ledger) or ledger.is_unfinished()


def _is_old(current: Authority, ledger: Ledger) -> bool:
    """Return whether there are no books, or they are of another run of the server or of another epoch than Postgres's.

    An older epoch: Postgres decided meanwhile. A newer epoch: Postgres was restored from a backup.
    """
    opened = ledger.opened()
    return opened is None or opened != (current.epoch, ledger.run_id)


@dataclass(frozen=True, slots=True)
class _Worker:
    """An incarnation of a worker that has not left. `seen`: it may be alive. `newest`: it has the name."""

    name: str
    incarnation: str
    capacity: Any
    seen: bool
    newest: bool
    labels: Any


class Opener:
    """The one process that opens an epoch. `term`: seconds of silence after which another process opens the next.

    The epoch is its fence: each script compares it with the books, each statement with the row `authority`. An opener
    that was stopped, and goes on after it was overtaken, is refused at its next step, whatever the step.
    """

    def __init__(
        self, engine: Engine, ledger: Ledger, epoch: int, term: float, began_ms: int, whole_stream: bool
    ) -> None:
        self._engine = engine
        self._ledger = ledger
        self._epoch = epoch
        self._term = term
        #: When the epoch was begun, in milliseconds of Postgres's clock.
        self._began_ms = began_ms
        #: True where the stream has all transitions that the old books noted.
        self._whole_stream = whole_stream
        #: The run of the server on which the ledger is opened.
        self._run_id = ledger.run_id
        self._reported_at = time.monotonic()

    def run(self) -> Rebuilt | None:
        """Write the books, then file the backlog.

        Return None where the opener was overtaken, or the server was emptied or restarted meanwhile.
        """
        try:
            self._close()
            with self._engine.connect() as connection:
                return self._rebuild(connection)
        except LedgerClosed as refused:
            logger.warning("epoch %d is not opened by this process any more: %s", self._epoch, refused)
            return None
        finally:
            with self._engine.connect() as connection:
                end_opening(connection, self._epoch)

    def _go_on(self) -> None:
        """Report that this process goes on, when it is time. Raises `LedgerClosed` where it was overtaken."""
        if time.monotonic() < self._reported_at + self._term / 4:
            return
        with self._engine.connect() as connection:
            if not still_opens(connection, self._epoch):
                raise LedgerClosed(None)
        self._reported_at = time.monotonic()

    def _close(self) -> None:
        """Close the old books, apply the stream to Postgres where it survived, and remove the books."""
        self._ledger.close_epoch(self._epoch, self._run_id, "begin")
        transition_log.apply_all(self._engine, self._ledger, between=self._go_on)
        self._wipe()
        # Entries that are left: the rows of their jobs are locked, and do not have the state of the jobs yet.
        jobs = sorted({transition.job for transition in transition_log.unapplied(self._ledger)})
        for start in range(0, len(jobs), BACKLOG_CHUNK):
            self._go_on()
            self._ledger.close_epoch(self._epoch, self._run_id, "carry", jobs[start : start + BACKLOG_CHUNK])
        # A later action of an operator is copied by its own program, once the epoch is open.
        with self._engine.connect() as connection:
            held_back = controls.read(connection)
        groups = control_groups(entries(held_back))
        self._ledger.open_epoch(self._epoch, self._run_id, held_back.version, groups)

    def _wipe(self) -> None:
        keep = {key.encode() for key in _KEPT}
        try:
            for pattern in (keys.LEDGER, keys.VIEWS):
                batch: list[bytes] = []
                for key in self._ledger.client.scan_iter(match=pattern, count=WIPE_CHUNK):
                    if key not in keep:
                        batch.append(key)
                    if len(batch) >= WIPE_CHUNK:
                        self._remove(batch)
                        batch = []
                self._remove(batch)
        except RedisError as error:
            raise StoreUnavailable(f"the old books cannot be removed: {error}") from error

    def _remove(self, batch: Sequence[bytes]) -> None:
        self._go_on()
        if batch:
            self._ledger.close_epoch(self._epoch, self._run_id, "remove", batch)

    def _rebuild(self, connection: Connection) -> Rebuilt:
        # First restore the borders: a job that is submitted meanwhile stays behind the jobs that stay in Postgres.
        refill.restore_borders(self._engine, self._ledger)
        workers, held = self._reserve(connection)
        self._await_reports([worker.name for worker in workers if worker.seen])
        self._go_on()
        revocation.tell_all(connection, self._ledger, between=self._go_on)
        filed = self._file_backlog(connection, doubtful=not self._whole_stream and self._is_any_silent(workers))
        self._ledger.finish_epoch(self._epoch)
        return Rebuilt(self._epoch, len(workers), held, filed)

    def _is_any_silent(self, workers: Sequence[_Worker]) -> bool:
        """Return whether an incarnation of a worker that had not left has not reported what it holds.

        A former incarnation of a worker can report nothing.
        """
        books = snapshot.read_books(self._ledger.client, {worker.name for worker in workers})
        reported = {book.incarnation for book in books.values() if book.status != WorkerStatus.CLOSED}
        return any(worker.incarnation not in reported for worker in workers)

    def _reserve(self, connection: Connection) -> tuple[list[_Worker], int]:
        """Write a closed book for each worker that has not left, with the jobs that it holds by Postgres."""
        ledger = self._ledger
        workers = [_Worker(*row) for row in connection.execute(_WORKERS, {"ttl": ledger.settings.worker_ttl * 2})]
        # A single statement for all held jobs: an index by incarnation would cost every transition.
        holdings: dict[str, list[Adopted]] = {}
        carried = ledger.carried()
        for incarnation, *row in connection.execute(_HELD):
            if row[0] not in carried:
                holdings.setdefault(incarnation, []).append(_adopted(row))
        held = 0
        for worker in workers:
            self._go_on()
            if not worker.newest:
                continue
            capacity = Capacity.from_people(worker.capacity).shape
            ledger.reserve_book(worker.name, worker.incarnation, capacity, worker.labels)
            jobs = holdings.get(worker.incarnation, [])
            for start in range(0, len(jobs), BACKLOG_CHUNK):
                ledger.adopt(worker.name, worker.incarnation, jobs[start : start + BACKLOG_CHUNK])
            held += len(jobs)
        self._give_back_orphans(carried)
        return workers, held

    def _give_back_orphans(self, carried: Collection[str]) -> None:
        """Give back, or end as lost, the jobs that Postgres has as running on a worker that has ended."""
        with (
            self._engine.connect().execution_options(isolation_level="READ COMMITTED") as connection,
            connection.begin(),
        ):
            if not hold_epoch(connection, self._epoch, self._term):
                raise LedgerClosed(None)
            orphans = [orphan for orphan in claims.orphans(connection) if orphan.job not in carried]
            most_losses = self._ledger.settings.most_losses
            # A job whose row is locked is left to a reconcile.
            claims.give_back_free(connection, orphans, None, "its worker has ended", most_losses)

    def _await_reports(self, workers: list[str]) -> None:
        """Wait, for a bounded time, until the live workers have opened their books again.

        The backlog is filed after that. Workers write their claims to Postgres within milliseconds; the wait covers the
        claims that were on their way.
        """
        pause = threading.Event()
        end = time.monotonic() + timeouts.REPORT * self._ledger.settings.store_timeout
        while workers and time.monotonic() < end:
            self._go_on()
            workers = self._ledger.unreported(workers)
            if workers:
                pause.wait(0.02)

    def _file_backlog(self, connection: Connection, *, doubtful: bool) -> int:
        """File the waiting jobs in their order. `doubtful`: each of these jobs may have started on a silent worker."""
        filed, after = 0, (-10, 0)
        while rows := backlog.backlog(connection, BACKLOG_CHUNK, after):
            self._go_on()
            filed += self._submit(rows, doubtful)
            after = (-rows[-1].priority, rows[-1].seq)
        seq = 0
        # Where jobs are not doubtful, the duty for scheduled jobs brings the due ones in.
        while doubtful and (rows := backlog.due(connection, BACKLOG_CHUNK, seq)):
            self._go_on()
            filed += self._submit(rows, doubtful)
            seq = rows[-1].seq
        return filed

    def _submit(self, rows: Sequence[Pending], doubtful: bool) -> int:
        if doubtful:
            most_losses = self._ledger.settings.most_losses
            rows = [in_doubt(row, most_losses) if row.submitted_ms < self._began_ms else row for row in rows]
        return resubmit.submit_rows(self._ledger, rows, self._engine)


def bring_in_carried(engine: Engine, ledger: Ledger) -> int:
    """Let in the jobs whose entries of an older epoch Postgres has by now, by their rows; return how many."""
    carried = ledger.carried()
    if not carried:
        return 0
    free = sorted(carried - {transition.job for transition in transition_log.unapplied(ledger)})
    for start in range(0, len(free), CARRIED_CHUNK):
        some = free[start : start + CARRIED_CHUNK]
        with engine.connect() as connection:
            rows = connection.execute(_ROWS, {"ids": some}).all()
        by_id = {row.id: (row.id, Token(row.epoch, row.attempt), row.state, _standing(row.state)) for row in rows}
        # If this process dies after this line, the next reconcile brings them in.
        ledger.unblock_carried([by_id.get(job, (job, NO_ATTEMPT, "", "held")) for job in some])
        reconcile.look_at(engine, ledger, some)
    return len(free)


def _standing(state: str) -> str:
    return "1" if state in FINAL else "held" if state in HOLDING else ""


_ROWS: Final = text("SELECT id, epoch, attempt, state FROM jobs WHERE id = ANY(CAST(:ids AS text[]))")


_WORKERS: Final = text("""
SELECT name, incarnation, capacity, seen_at > now() - make_interval(secs => :ttl) AND newest = 1, newest = 1,
       labels
FROM (SELECT *, row_number() OVER (PARTITION BY name ORDER BY started_at DESC) AS newest
      FROM workers WHERE status IN ('ready', 'draining')) AS w ORDER BY name, newest
""")
_HELD: Final = text("""
SELECT incarnation, id, name, epoch, attempt, shape, priority, seq, losses,
       (extract(epoch FROM admitted_at) * 1000)::bigint, (extract(epoch FROM started_at) * 1000)::bigint, rerun
FROM jobs WHERE state IN ('admitted', 'running') AND incarnation IS NOT NULL ORDER BY id
""")


def _adopted(row: Any) -> Adopted:
    job, name, epoch, attempt, shape, priority, seq, losses, admitted, started, rerun = row
    position, filed = order(priority, seq), filed_shape(shape, name)
    return Adopted(job, Token(epoch, attempt), filed, position, admitted or 0, started or 0, "", losses, rerun)
