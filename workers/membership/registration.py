"""A worker's place in the cluster: registering its capacity, renewing the lease, leaving."""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Callable, Collection
from datetime import UTC, datetime
from functools import partial
from typing import Final

from redis.exceptions import OutOfMemoryError

from celery_capacity.routing.database.postgres_errors import translated
from celery_capacity.routing.errors import StoreUnavailable
from celery_capacity.routing.ledger import keys
from celery_capacity.routing.ledger.replies import Filled, LapseVerdict, LedgerClosed, Taken
from celery_capacity.routing.model.amounts import format_cpus
from celery_capacity.routing.model.capacity import Capacity
from celery_capacity.routing.model.states import Store, WorkerStatus
from celery_capacity.routing.model.token import Token
from celery_capacity.routing.recovery import transition_log
from celery_capacity.routing.recovery.reclaim import take_back
from celery_capacity.routing.store import fencing, worker_rows
from celery_capacity.routing.store.worker_rows import WorkerRow
from celery_capacity.workers.dispatch.published_declarations import Declarations, parts_of
from celery_capacity.workers.membership import orphans
from celery_capacity.workers.membership.context import WorkerContext
from celery_capacity.workers.membership.lifetime import Lifetime
from celery_capacity.workers.membership.name_claim import NameClaim
from celery_capacity.workers.process.claim_writer import running
from celery_capacity.workers.process.holdings import Holdings
from celery_capacity.workers.process.identity import is_known_dead
from celery_capacity.workers.results.outcome_writer import Recorder

logger = logging.getLogger(__name__)

#: Seconds between heartbeats written to Postgres, at the least.
POSTGRES_EVERY: Final = 30.0


class Membership:
    """Membership of a worker. Each call blocks for one exchange with stores; threads and signals are the caller's."""

    def __init__(
        self,
        context: WorkerContext,
        unwritten: Callable[[], set[str]] = set,
        flush: Callable[[float], object] = lambda _: True,
    ) -> None:
        """Make a membership that is not registered yet.

        `unwritten` returns the jobs with notes of this worker that Postgres does not have yet. `flush` waits,
        for so many seconds, until Postgres has them.
        """
        self._engine = context.engine
        self._later = context.recorder.call
        self._recorder = context.recorder
        self._unwritten = unwritten
        self._flush = flush
        self._ledger = context.ledger
        self._confirmation = context.confirmation
        self.identity = context.identity
        self.name_claim = NameClaim(context.engine, context.ledger, context.identity)
        self.draining = False
        self.lifetime = Lifetime.of(context.settings.lifetime)
        context.holdings.left = self.lifetime.left_ms
        #: Published capacity.
        self._capacity: Capacity | None = None
        #: Capacity of the machine: more than is published while attempts run here that lost their lease.
        self._measured: Capacity | None = None
        #: Requests of the tasks that the worker knows, by name, and the names that are published.
        self.declared: Declarations = {}
        self._published: Collection[str] = ()
        #: Time of the newest heartbeat in Postgres (monotonic). -inf: Postgres is to hear of this worker at once.
        self._seen_at = -math.inf
        #: Dead workers of this machine of which nothing runs here any more.
        self._seen_to: set[str] = set()
        #: Last report to Postgres: True if this worker has lost the ledger.
        self._told_lost = False

    @property
    def registered(self) -> bool:
        """Return True if registration was begun: then there may be something to leave."""
        return self._capacity is not None

    @property
    def _may_admit(self) -> bool:
        """Return True if jobs may start here: this process may decide, and Postgres is not too far behind."""
        return self._confirmation.may_admit and not self._recorder.is_behind()

    # -- joining -------------------------------------------------------------------------------------------------

    def register(self, capacity: Capacity, declared: Declarations, challenge: Callable[[], None]) -> int:
        """Publish the capacity in the epoch that Postgres confirms; return how many waiting jobs were admitted.

        Jobs that the name's former incarnation still holds are taken back first. Raises `NameTaken`, `LedgerClosed`.
        """
        self._capacity, self._measured, self.declared = capacity, capacity, declared
        epoch = self._confirmation.ask()
        # Postgres knows the worker before the ledger does: a rebuild begins with the workers that Postgres knows.
        self._write_seen(WorkerStatus.READY)
        return self._register(epoch, WorkerStatus.READY, challenge)

    def register_in_postgres(self, capacity: Capacity, declared: Declarations, *, ledger_lost: bool) -> None:
        """Join without the ledger. The heartbeat registers in the ledger too, once it can."""
        self._capacity, self._measured, self.declared = capacity, capacity, declared
        self._told_lost = ledger_lost
        self._write_seen(WorkerStatus.READY)
        self._later(self._write_declarations)
        self._end_former_incarnations()

    def _register(self, epoch: int, status: WorkerStatus, challenge: Callable[[], None]) -> int:
        self._ledger.epoch = epoch
        while isinstance(reply := self._publish(status), Taken):
            self.name_claim.take(challenge)
            self._take_over(reply.incarnation)
        # A former incarnation that held nothing when its lease ran out has left no book to take over.
        self._later(self._end_former_incarnations)
        self._declare()
        return reply.admitted

    def _publish(self, status: WorkerStatus) -> Filled | Taken:
        """Publish the capacity and the tasks in the ledger, and return its answer."""
        assert self._capacity is not None, "register comes first"
        identity, declared = self.identity, frozenset(self.declared)
        # Where the ledger does not answer, the next `resize` publishes all of it again.
        self._published = ()
        reply = self._ledger.register(
            identity.name,
            identity.incarnation,
            identity.queue,
            self._capacity.shape,
            self._view(full=True),
            status,
            tasks=self.declared,
            left_ms=self.lifetime.left_ms(),
            labels=self._ledger.settings.labels,
            admit=self._may_admit,
        )
        self._published = declared
        return reply

    def _take_over(self, incarnation: str) -> None:
        """Take back the jobs of a former incarnation of which nothing runs any more.

        Such an incarnation is dead, or was silent until its lease had run out. An incarnation that renews its lease
        just now stays.
        """
        name, settings = self.identity.name, self._ledger.settings
        with self._engine.connect() as connection:
            row = worker_rows.find_worker(connection, incarnation)
        if row is not None and self.name_claim.is_over(row):
            self._ledger.expire_lease(name, incarnation)
        elif self._ledger.lapse(name, 0, settings.most_losses, most=0).verdict is not LapseVerdict.DUE:
            return
        logger.warning("the former incarnation of worker %s is over: its jobs are taken back", name)
        lapsed = take_back(self._engine, self._ledger, name, incarnation, 0)
        logger.warning("%d jobs of the former incarnation of %s were taken back", lapsed.taken_back, name)
        if lapsed.verdict is LapseVerdict.WAITS:
            # Wait for a transaction that keeps the row of one of its jobs locked.
            threading.Event().wait(settings.due_interval)

    def rejoin(self, holdings: Holdings, recorder: Recorder, challenge: Callable[[], None]) -> None:
        """Register again after a new epoch, and report at once the jobs that are held.

        This happens wholly or not at all: until it is done this handle of the ledger has no epoch, and does nothing.
        """
        try:
            self._rejoin(holdings, recorder, challenge)
        except BaseException:
            self._ledger.epoch = 0
            raise

    def _rejoin(self, holdings: Holdings, recorder: Recorder, challenge: Callable[[], None]) -> None:
        # The opener of the ledger goes by the rows: a job that ended here must be in them first, or it would run again.
        self._flush(self._ledger.settings.due_interval)
        # Closed until the books know this worker's jobs, so that nobody takes their capacity for free meanwhile.
        self._register(self._confirmation.epoch, WorkerStatus.CLOSED, challenge)
        self._seen_at = -math.inf
        held = holdings.all()
        refused: set[tuple[str, Token]] = set()
        if held:
            adopted = [holding.as_adopted() for holding in held]
            refused = set(self._ledger.adopt(self.identity.name, self.identity.incarnation, adopted))
        if refused and self._measured is not None:
            holdings.disown(refused)
            self.resize(self._measured, holdings)
        recorder.add(
            [running(self.identity, holding) for holding in held if holding.key not in refused and not holding.ended]
        )
        for job, token in sorted(refused):
            logger.warning("job %s: the lease of attempt %s went to another one while the ledger was lost", job, token)
        # This list is complete: a job that is held here by Postgres, and not in the list, is taken back at once.
        self.renew(holdings, missing_ms=0)
        if self.draining:
            self._ledger.drain(self.identity.name, self.identity.incarnation)
        logger.warning("registered again in epoch %d: %d jobs held", self._ledger.epoch, len(held))

    def _declare(self) -> None:
        if not self.declared:
            return
        people, times = parts_of(self.declared)
        timeless = people.keys() - times
        try:
            pipe = self._ledger.client.pipeline(transaction=False)
            pipe.hset(keys.DECLARATIONS, mapping={name: json.dumps(people[name]) for name in people})
            if times:
                pipe.hset(keys.DECLARED_TIMES, mapping={name: json.dumps(times[name]) for name in times})
            if timeless:
                pipe.hdel(keys.DECLARED_TIMES, *timeless)
            pipe.execute()
        except OutOfMemoryError as error:
            # Meanwhile senders that do not know a task ask for the default. Its jobs run all the same.
            logger.warning("the declarations of this worker's tasks are not published: %s", error)
        self._later(self._write_declarations)

    # -- Postgres ------------------------------------------------------------------------------------------------

    @property
    def _status(self) -> WorkerStatus:
        return WorkerStatus.DRAINING if self.draining else WorkerStatus.READY

    def postgres_due_in(self, ledger_lost: bool) -> float:
        """Return the seconds until Postgres is to hear of this worker: at once where it lost or found the ledger."""
        if ledger_lost != self._told_lost:
            return 0.0
        return max(0.0, self._seen_at + self._seen_every() - time.monotonic())

    def _seen_every(self) -> float:
        """Return the seconds between heartbeats in Postgres: fewer if they are all there is, without the ledger's."""
        settings = self._ledger.settings
        if self._told_lost or self._confirmation.authority == Store.POSTGRES:
            return settings.renew_interval
        return min(POSTGRES_EVERY, settings.worker_ttl / 2)

    def tell_postgres(self, ledger_lost: bool, flush_within: float) -> bool:
        """Tell Postgres that this worker lives, and whether it lost the ledger; return False if that has to wait.

        Before a worker says that it lost the ledger, it writes its claims there to Postgres: Postgres takes all other
        jobs for waiting. An end whose row is locked, or takes no write, does not keep Postgres from deciding, since
        nobody takes such a job.
        """
        told_lost = self._told_lost
        if ledger_lost and not told_lost and not self._recorder.is_level(lambda: bool(self._flush(flush_within))):
            return False
        self._told_lost = ledger_lost
        try:
            self._write_seen(self._status)
        except BaseException:
            self._told_lost, self._seen_at = told_lost, -math.inf
            raise
        return True

    def _write_declarations(self) -> None:
        with self._engine.connect() as connection:
            worker_rows.declare(connection, *parts_of(self.declared))

    def _end_former_incarnations(self) -> None:
        with self._engine.connect() as connection:
            worker_rows.end_former_incarnations(connection, self.identity.name, self.identity.incarnation)
            if self._ledger.epoch:
                try:
                    # The last entries of former incarnations have the values that their jobs returned.
                    transition_log.apply_all(self._engine, self._ledger)
                except (StoreUnavailable, LedgerClosed):
                    return  # a reconcile closes the ends once it has read the stream
            # If the ledger was lost with such an incarnation, nobody takes its jobs back. So its committed ends are
            # closed.
            fencing.close_former(connection, self.identity.name, self.identity.incarnation)

    # -- staying and leaving -------------------------------------------------------------------------------------

    def renew(self, holdings: Holdings, missing_ms: int | None = None) -> bool:
        """Renew the lease once; return False if the ledger does not know this worker, which must register again.

        `missing_ms`: see `Ledger.renew`.
        """
        renewed = self._ledger.renew(
            self.identity.name,
            self.identity.incarnation,
            self._view(full=False),
            # Two kinds of jobs are not lost either. The row of an ended job may still say that it runs. A job whose
            # claim was carried out, and whose answer was lost, is claimed again.
            [*{*holdings.jobs(), *holdings.claiming, *self._unwritten()}],
            self._ledger.settings.most_losses,
            admit=self._may_admit,
            missing_ms=missing_ms,
        )
        if renewed.taken_back:
            logger.warning("%d jobs that this worker no longer holds were taken back", renewed.taken_back)
        return renewed.known

    def resize(self, capacity: Capacity, holdings: Holdings) -> None:
        """Publish another capacity (the pool grew, a quota changed) or other tasks; jobs that fit are admitted at once.

        Attempts that lost their lease and still run are subtracted from it.
        """
        holdings.capacity, self._measured = dict(capacity.amounts), capacity
        capacity = holdings.left_of(capacity)
        if self.draining or (capacity == self._capacity and self.declared.keys() == self._published):
            return
        before, self._capacity = self._capacity, capacity
        reply = self._publish(WorkerStatus.READY)
        if isinstance(reply, Taken):
            # This worker lost its lease meanwhile: the heartbeat that follows finds out, and registers again.
            return
        self._seen_at = -math.inf
        self._declare()
        if before != capacity:
            logger.warning("capacity changed from %s to %s", before and before.to_people(), capacity.to_people())
        logger.info("published %d tasks; waiting jobs that were admitted: %d", len(self.declared), reply.admitted)

    def drain(self) -> int:
        """Admit nothing more here, and hand back the jobs that were not started; return how many."""
        self.draining = True
        handed = self._ledger.drain(self.identity.name, self.identity.incarnation)
        self._seen_at = -math.inf
        return handed

    def leave(self, holdings: Holdings) -> bool:
        """Deregister; return False if a job is still held. Raises `PlatformError` where a store is down."""
        if not holdings.all():
            # Postgres first: a worker whose book alone is gone would be ready in Postgres for ever. A worker that still
            # has its book loses that with its lease.
            self._write_left()
        if self._confirmation.authority == Store.POSTGRES:
            return not holdings.all()
        left = self._ledger.leave(self.identity.name, self.identity.incarnation) == 0
        if left:
            self._write_left()
            self.name_claim.lock.remove()
        return left

    def _write_left(self) -> None:
        with translated(), self._engine.connect() as connection:
            worker_rows.end_worker(connection, self.identity.incarnation, WorkerStatus.LEFT)

    def _write_seen(self, status: WorkerStatus) -> None:
        # Write the whole capacity. Only the books get less, while attempts without a lease take up a part of it.
        capacity = self._measured
        assert capacity is not None, "register comes first"
        identity = self.identity
        row = WorkerRow(
            name=identity.name,
            incarnation=identity.incarnation,
            cpus=capacity.get("cpus"),
            memory=capacity.get("memory"),
            capacity=capacity.to_people(),
            hostname=identity.hostname,
            pid=identity.pid,
            pid_space=identity.pid_space,
            start_ticks=identity.start_ticks,
            version=identity.version,
            started_at=identity.started_at,
            labels=self._ledger.settings.labels,
        )
        asked = self._seen_at = time.monotonic()
        with self._engine.connect() as connection:
            answer, lost = worker_rows.see_worker(
                connection, row, status, ledger_lost=self._told_lost, left_ms=self.lifetime.left_ms()
            )
        self._confirmation.hear(asked, answer)
        # The jobs of these workers may have been taken back from another machine, which cannot end their processes.
        for worker in lost:
            if worker.incarnation not in self._seen_to and is_known_dead(worker, identity.pid_space):
                self._seen_to.add(worker.incarnation)
                # It looks at all processes and waits for their end, so no heartbeat does it.
                self._later(partial(orphans.see_to, worker, identity.pid_space))

    def _view(self, *, full: bool) -> dict[str, str]:
        """Return the fields of `worker:<name>`. The scripts themselves keep the fields about allocations."""
        assert self._capacity is not None, "register comes first"
        identity = self.identity
        view = {
            "cpus": format_cpus(self._capacity.get("cpus")),
            "memory": str(self._capacity.get("memory")),
            "slots": str(self._capacity.get("slots")),
            "hostname": identity.hostname,
            "pid": str(identity.pid),
            "incarnation": identity.incarnation,
            "started_at": identity.started_at,
            "heartbeat_at": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "version": identity.version,
            "queue": identity.queue,
        }
        if full:
            view |= {
                "status": WorkerStatus.READY.value,
                "allocated_cpus": "0",
                "allocated_memory": "0",
                "allocated_slots": "0",
            }
        return view
