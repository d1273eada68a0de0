"""Parts of a worker of the platform, put together: one attribute of the worker, `platform_runtime`.

::

    intake ----arrived---> ledger thread --claimed--> main loop --> pool --> JobRequest hooks
    ended (JobRequest) --> released (ledger thread) --> delivered (delivery) --> recorded (recorder)
    heartbeat: Postgres, lease, epoch, drain        intake: beat's ticks, old producers        duties: repair
"""

from __future__ import annotations

import atexit
import logging
import math
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Final

from celery import Celery
from celery.platforms import EX_OK
from celery.worker import state as worker_state
from kombu.serialization import prepare_accept_content

from celery_capacity.routing.config import timeouts
from celery_capacity.routing.config.machine import Detected
from celery_capacity.routing.errors import NameTaken, PlatformError
from celery_capacity.routing.ledger.replies import LedgerClosed
from celery_capacity.routing.model.envelope import Unreadable
from celery_capacity.routing.model.outbox import Outbox
from celery_capacity.routing.model.reasons import Refusal
from celery_capacity.routing.model.states import Outcome
from celery_capacity.routing.model.token import Token
from celery_capacity.routing.wake import Wake
from celery_capacity.workers.broker import beat_messages, transport
from celery_capacity.workers.broker.decompression import TIMES
from celery_capacity.workers.broker.ledger_queue import LedgerQueue
from celery_capacity.workers.dispatch.published_declarations import Declarations
from celery_capacity.workers.execute.enroll import Intake
from celery_capacity.workers.execute.outcome_check import JUDGED, Ambiguous, BodyEnd, gone_back, judge
from celery_capacity.workers.execute.rejected import attempt_of, refusing, take_raw
from celery_capacity.workers.execute.returned import ReturnedMessages
from celery_capacity.workers.execute.start_queue import StartQueue
from celery_capacity.workers.membership.authority_check import Confirmation
from celery_capacity.workers.membership.context import WorkerContext
from celery_capacity.workers.membership.epoch_watch import EpochWatch
from celery_capacity.workers.membership.heartbeat import HeartbeatThread, end_cold
from celery_capacity.workers.membership.join import Joining
from celery_capacity.workers.membership.preflight import shares_ledger
from celery_capacity.workers.membership.registration import Membership
from celery_capacity.workers.membership.served_queues import ServedQueues
from celery_capacity.workers.process.exit_codes import Exit
from celery_capacity.workers.process.holdings import Holdings
from celery_capacity.workers.process.identity import Identity
from celery_capacity.workers.process.service import Services
from celery_capacity.workers.process.stores import Stores
from celery_capacity.workers.results import running_workers
from celery_capacity.workers.results.chord_parts import ChordParts
from celery_capacity.workers.results.deliver import Delivery
from celery_capacity.workers.results.deliver_later import deliver_parts, note_rest, tell_late
from celery_capacity.workers.results.events import Announcer
from celery_capacity.workers.results.outcome_writer import Recorder
from celery_capacity.workers.results.quarantine_thread import QuarantineThread
from celery_capacity.workers.runner.duty_runner import OUTBOX, Runner
from celery_capacity.workers.settle.postgres_ends import PostgresEnds
from celery_capacity.workers.settle.pull_thread import Puller
from celery_capacity.workers.settle.settle_thread import LedgerThread
from celery_capacity.workers.supervision.drain import Drain
from celery_capacity.workers.supervision.health import Health

logger = logging.getLogger(__name__)

#: Seconds after which a running thread lets another one run. A job passes from the main loop to the ledger thread and
#: back twice. At Python's 5 ms a busy loop alone would use up the 10 ms from a release to the next start.
SWITCH_INTERVAL: Final = 0.0005


class Runtime:
    """Everything that runs in a worker, from `worker_init` to its end. `green`: its pool runs greenlets."""

    def __init__(self, app: Celery, stores: Stores, identity: Identity, green: bool) -> None:
        self.app = app
        self.stores = stores
        self.identity = identity
        self.pid = os.getpid()
        self._green = green
        settings, engine = stores.settings, stores.keep_connections()
        #: Seconds for each step of leaving. The whole is bounded, and the duties repair steps that are not done.
        self._leave_within = timeouts.LEAVE * settings.store_timeout
        # The worker's own client: its epoch is that of the worker's registration. `stores.ledger` follows Postgres.
        self.ledger = ledger = stores.new_ledger()
        self.confirmation = Confirmation(engine, settings.confirm_interval, self._on_regained)
        self._loop, self.holdings = Wake(), Holdings({}, worker=identity.name, labels=settings.labels)
        self.wake_loop = self._loop.set
        self.announcer = Announcer(app, engine, identity.name, self.wake_loop)
        self.recorder = Recorder(engine, ledger, self.announcer.waiting, self._on_regained, settings.write_within)
        context = WorkerContext(settings, engine, ledger, identity, self.confirmation, self.holdings, self.recorder)
        self.reachability = context.reachability
        self._accept = prepare_accept_content(app.conf.accept_content)
        returned = ReturnedMessages(
            ledger.tally,
            app.tasks.__contains__,
            self.holdings.put_off,
            lambda job, token, reason: self.ledger_thread.give_back(job, token, reason),
            settings.start_timeout,
        )
        jobs = (self._hand_back, self.holdings.start, self.refusing)
        self.start_queue = StartQueue(self._loop, self.announcer, returned, *jobs)
        self.start_queue.accept = self._accept
        if green:
            self.start_queue.start_greenlets()
        self._make_intake(context)
        self._make_threads(context)
        self.leaving = self.stops_cold = False

    def _make_intake(self, context: WorkerContext) -> None:
        """Make the parts by which results leave the worker, and by which messages come to it."""
        app, identity, settings = self.app, self.identity, context.settings
        #: Deliver chord parts for any thread that asks: a join may wait without limit.
        self.parts = ChordParts(identity.incarnation)
        self.delivery = Delivery(
            lambda: app.backend,
            identity.incarnation,
            self.recorder.add,
            self.recorder.write,
            self.parts,
            self._note_rest,
        )
        self.membership = Membership(context, self._unwritten, self._flush)
        self.quarantine = QuarantineThread(context.engine, context.ledger.tally, identity.name)
        self.served_queues = ServedQueues(app, settings, self.remeasure)
        self.reachability.on_found = transport.doubt
        shared = shares_ledger(app, settings) and not self._green
        if shared:
            self.reachability.on_silence = lambda: self.announcer.consumer and self.announcer.consumer.cut()
        private = (identity.queue, self.arrived) if shared else None
        self.intake = Intake(app, self.served_queues, self.on_tick, self.announcer.refused, private)
        #: Takes the messages of the private queue where the intake does not.
        to = (self._accept, self.quarantine, identity.queue, self.arrived)
        self.ledger_queue = None if shared else LedgerQueue(settings, identity.queue, lambda raw: take_raw(raw, *to))

    def _make_threads(self, context: WorkerContext) -> None:
        """Make the threads that settle jobs, say that the worker lives, and run the duties."""
        app, stores, identity = self.app, self.stores, self.identity
        self.joining = Joining(stores, self.membership, self.confirmation, self.reachability, self.intake.challenge)
        self.puller = Puller(context, stores, self._flush, self.start_queue.take, lambda: self.start_queue.attached)
        self.in_postgres = PostgresEnds(
            context,
            self.puller.wake,
            lambda: self.duties.tick(OUTBOX),
            partial(deliver_parts, app, stores),
            partial(tell_late, app, context.engine, identity.incarnation),
        )
        self.heartbeat = HeartbeatThread(
            context,
            self.membership,
            self.intake.challenge,
            lambda: self.served_queues.detect().capacity,
            lambda: self.ledger_thread.wake(),
            self._on_taken,
        )
        self.ledger_thread = LedgerThread(
            context,
            self.in_postgres,
            self.delivery.add,
            self.start_queue.take,
            self.heartbeat.closed,
            self.quarantine.set_aside,
        )
        self.start_queue.settles = None if self._green else self.ledger_thread.loop
        decides = (lambda: self.confirmation.authority, context.ledger, lambda: self.confirmation.resting)
        self.duties = Runner(app, stores, identity.incarnation, *decides)
        self.duties.election.worker, self.duties.election.on_look = identity.name, self.heartbeat.looked
        ticks = beat_messages.channel(app) if self.ledger_queue is None else ""
        acts = (self.holdings.all, lambda signal: self.announcer.consumer.break_off(signal), self._end)
        self.drain_service = Drain(context.engine, identity.name, context.settings.due_interval, *acts)
        self.duties.election.news = news = EpochWatch(
            context.settings, self.heartbeat.look, self.on_tick, ticks, self.duties.on_low
        )
        news.worker, news.on_cordon = identity.name, self.drain_service.look
        self.puller.on_cordon = self.drain_service.look
        self.confirmation.on_epoch, self.confirmation.on_authority = self.heartbeat.look, self.puller.wake
        self.health = Health(context.settings.health_dir, self.start_queue)
        self.heartbeat.on_look = self.health.beat
        self.heartbeat.on_renewed = self._close_spare_connections
        self.heartbeat.on_missing = self.ledger_thread.on_missing = self.duties.suspect
        self.confirmation.idle = lambda: self.ledger_thread.idle and not self.reachability.lost
        #: Stages of the end of an attempt, the last one first: recorded, delivered, released.
        self.stages = Services(self.quarantine, self.recorder, self.delivery, self.ledger_thread)
        membership = (self.confirmation, self.puller, self.heartbeat)
        self.member_services = Services(*membership, self.ledger_queue, self.intake, self.duties, self.drain_service)

    # -- from start to end ---------------------------------------------------------------------------------------

    def run(self, start: Callable[[], None]) -> None:
        """Run the worker's `start`, which returns at its end. Whatever the end, no part of the runtime outlives it."""
        # Celery tells nobody of most ends of a worker in a thread.
        running_workers.begin(self)
        self.receive()
        try:
            start()
        finally:
            self.leave()

    def receive(self) -> None:
        """Set aside in this runtime's quarantine the messages that this process receives and cannot read."""
        transport.receiving.set_aside = self.quarantine.set_aside
        transport.receiving.most_bytes = TIMES * self.stores.settings.max_message

    def join(self, slots: Callable[[], int], declared: Declarations) -> tuple[Detected, int]:
        """Register, start the threads; return the published capacity and the number of jobs admitted at once."""
        self.served_queues.slots = slots
        self.health.begin(self.stores.settings.renew_interval)
        sys.setswitchinterval(SWITCH_INTERVAL)
        detected = self.served_queues.detect()
        self.holdings.capacity, self.holdings.tasks = dict(detected.capacity.amounts), frozenset(declared)
        self.stages.start()
        admitted = self.joining.enter(detected.capacity, declared, self.wait_to_start)
        self.member_services.start()
        atexit.register(self.leave)
        return detected, admitted

    def wait_to_start(self, seconds: float) -> None:
        """Wait in the main thread, whose loop does not run yet: a TERM ends the start."""
        self._loop.wait(seconds)
        worker_state.maybe_shutdown()

    def remeasure(self) -> None:
        """Measure the capacity anew. A job that is admitted meanwhile, and fits no more, is handed back."""
        self.holdings.capacity = dict(self.served_queues.detect().capacity.amounts)
        self.confirmation.needed()
        self.heartbeat.tick()
        self.puller.wake()

    def declare(self, declared: Declarations) -> None:
        """Publish the tasks that this worker knows now."""
        self.holdings.tasks, self.membership.declared = frozenset(declared), declared
        self.heartbeat.tick()

    def drain(self) -> None:
        """Have nothing more admitted to this worker. Safe in a signal handler."""
        self.ledger_thread.draining = True
        self.puller.draining = True
        self.heartbeat.drain()
        # Celery's loop looks only now and then whether it is to stop: it is woken to do so.
        self._loop.set()

    def stops(self, cold: bool) -> None:
        """Note a stop, and whether it waits for running jobs. Safe in a signal handler."""
        self.stops_cold |= cold
        self.heartbeat.cold_in(self.stores.settings.shutdown_grace or math.inf)

    def leave(self) -> None:
        """Settle ended jobs, hand back the others, deregister. Bounded in time, and safe to call twice."""
        if self.leaving or os.getpid() != self.pid:
            return
        self.leaving = True
        atexit.unregister(self.leave)
        self.member_services.stop(self._leave_within)
        self._end_all()
        self.ledger_thread.stop(self._leave_within)
        self._hand_back_unstarted()
        self.delivery.stop(self._leave_within)
        self.recorder.flush(self._leave_within)
        self._deregister()
        self.recorder.stop(self._leave_within)
        running_workers.end(self)
        for newest in running_workers.running()[-1:]:
            newest.receive()
        self.quarantine.stop(self._leave_within)
        self.health.end()

    def _end_all(self) -> None:
        """End the attempts that are still held, since the pool has ended."""
        why = "the worker was stopped"
        for holding in self.holdings.running():
            ended = Ambiguous.STOPPED if holding.started else Outcome.HANDED_BACK
            self.end_job(holding.job, holding.token, ended, why, Outbox(), None)
        # All of them have ended by now, but for those about which Postgres did not answer.
        self.recorder.flush(self._leave_within)
        for holding in self.holdings.running():
            outcome = gone_back(holding.rerun or not holding.started)
            self.ledger_thread.end(holding.job, holding.token, outcome, why)

    def _hand_back_unstarted(self) -> None:
        try:
            if self.membership.registered and not self.membership.draining:
                self.membership.drain()
                self.recorder.call(lambda: self.membership.tell_postgres(self.reachability.lost, 0.0))
        except (PlatformError, LedgerClosed) as error:
            logger.warning("jobs that this worker has not started are taken back later: %s", error)

    def _deregister(self) -> None:
        try:
            if self.membership.registered and not self.membership.leave(self.holdings):
                logger.warning("this worker still holds jobs; they are taken back when its lease runs out")
        except (PlatformError, LedgerClosed) as error:
            logger.warning("could not deregister, the lease will run out: %s", error)

    # -- messages ------------------------------------------------------------------------------------------------

    def arrived(self, message: Any) -> None:
        """Pass on a message of the private queue. Nothing here waits: it runs in the thread that takes the message."""
        try:
            tag, request = attempt_of(message)
        except (PlatformError, Unreadable) as error:
            self.quarantine.set_aside(transport.raw_of(message), self.identity.queue, Refusal.FOREIGN, str(error))
            return
        self.ledger_thread.arrive(tag, request, message)

    def attach(self, hub: Any) -> None:
        """Attach the main loop, see `StartQueue.attach`, and pull jobs from Postgres."""
        self.start_queue.attach(hub)
        self.puller.wake()

    def refusing(self, message: Any, error: str) -> AbstractContextManager[None]:
        """Return the context that ends the job of a refused message, see `workers.execute.rejected`."""
        return refusing(message, error, self.identity, self.app, self.quarantine, self.end_job, self.announcer.failed)

    def end_job(
        self,
        job: str,
        token: Token,
        outcome: Outcome | Ambiguous,
        error: str | None,
        outbox: Outbox,
        on_lost: Callable[[], None] | None,
    ) -> bool:
        """End an attempt; return False for a repeated end. Postgres is asked first about an ambiguous end."""
        end = BodyEnd(job, token, outcome, error, outbox)
        if outcome in JUDGED:
            rerun = self.holdings.may_rerun(job, token)
            self.recorder.call(lambda: self._release(judge(self.stores.engine, end, rerun), on_lost))
            return True
        return self._release(end, on_lost)

    def _release(self, end: BodyEnd, on_lost: Callable[[], None] | None) -> bool:
        results, rest = self.app.backend.kept_in(self.stores.settings.redis_url, end.outbox)
        whole = end.outbox.to_text if results else None
        outcome = Outcome(end.outcome)
        return self.ledger_thread.end(end.job, end.token, outcome, end.error, on_lost, rest.to_text(), results, whole)

    def _hand_back(self, job: str, token: Token) -> None:
        self.ledger_thread.end(job, token, Outcome.HANDED_BACK, "not started")

    def _unwritten(self) -> set[str]:
        """Return the jobs with notes of this worker that Postgres does not have yet."""
        return self.delivery.jobs() | self.recorder.jobs()

    def _flush(self, within: float) -> bool:
        """Wait until Postgres has all that this worker noted."""
        return self.delivery.flush(within) and self.recorder.flush(within)

    def _note_rest(self, job: str, left: str, rest: str) -> None:
        """Settle a late chord part, in its thread. If its row is unwritten by then, a duty of this worker does it."""
        self._flush(self._leave_within)
        note_rest(self.stores.engine, job, left, rest)

    # -- between the threads -------------------------------------------------------------------------------------

    def on_tick(self, name: str) -> None:
        """Pass on beat's tick, in the thread that hears it."""
        self.heartbeat.tick()
        self.duties.tick(name)

    def _on_regained(self) -> None:
        """Note that this worker may admit again: the heartbeat fills the room that was released meanwhile."""
        self.heartbeat.tick()
        self.ledger_thread.wake()

    def _close_spare_connections(self) -> None:
        self.ledger_thread.loop.rest()
        self.duties.close_spare_connections()

    def _on_taken(self, error: NameTaken) -> None:
        """End as after a TERM, with an exit code that says why. In the heartbeat's thread."""
        logger.critical("this worker ends: %s", error)
        self._end(cold=False, code=Exit.UNAVAILABLE)

    def _end(self, cold: bool, code: int = EX_OK) -> None:
        """End as after a TERM, or cold as after a QUIT; in any thread."""
        if cold:
            end_cold()
            return
        worker_state.should_stop = code
        self.stops(cold=False)
        self.drain()


def runtime_of(worker: Any) -> Runtime | None:
    """Return the runtime of a worker (Celery's `WorkController`), None where it is not a worker of the platform."""
    runtime = getattr(worker, "platform_runtime", None)
    return runtime if isinstance(runtime, Runtime) else None
