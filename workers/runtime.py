"""What a worker process of the platform is made of, put together: one attribute of the app, `worker_runtime`.

::

    main loop --arrived--> ledger thread --claimed--> main loop --> pool --> JobRequest hooks --end--> ledger thread
                              |                                                                         |
                              +------------------------ transitions --------> recorder (Postgres) <-----+
    pulse: heartbeat, epoch, drain        intake: beat's ticks, old producers        duties: repair
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Final

from celery import Celery
from celery.worker import state as worker_state

from routing.capacity import Capacity, Detected, detect
from routing.errors import NameTaken, PlatformError
from routing.ledger import Ledger
from routing.message import parse_tag
from routing.replies import LedgerClosed
from routing.request import Request
from workers import duties
from workers.confirmation import Confirmation
from workers.exits import EX_NAME_TAKEN
from workers.holdings import Holdings
from workers.identity import Identity
from workers.intake import Intake
from workers.ledger_thread import LedgerThread
from workers.membership import Membership
from workers.pulse import Pulse
from workers.recorder import Recorder
from workers.router import HEADER
from workers.stores import Stores
from workers.wake import Wake

logger = logging.getLogger(__name__)

#: Seconds after which a thread that runs lets another one run. A job passes from the main loop to the ledger thread and
#: back twice; at Python's 5 ms a busy loop alone would use up the 10 ms from a release to the next start.
SWITCH_INTERVAL: Final = 0.0005
#: Seconds for each step of leaving; the whole is bounded, and what is not done is repaired by the duties.
LEAVE_WITHIN: Final = 5.0


class Runtime:
    """One for each worker process. Made at `worker_init`, running from `worker_ready` to `worker_shutdown`."""

    def __init__(self, app: Celery, stores: Stores, identity: Identity) -> None:
        self.app = app
        self.stores = stores
        self.identity = identity
        self.pid = os.getpid()
        settings, engine = stores.settings, stores.engine
        # A handle of the worker's own: its epoch is the one in which this worker is registered and has said what it
        # holds, while that of `stores.ledger` follows whatever Postgres confirms to senders and duties.
        ledger = Ledger(settings)
        exclusive = threading.Lock()
        self.confirmation = Confirmation(engine, settings.confirm_interval, self._on_regained)
        self.recorder = Recorder(engine, ledger)
        self.membership = Membership(engine, ledger, identity, self.confirmation, self.recorder.call)
        self.holdings = Holdings({})
        self.intake = Intake(app, self.on_tick)
        self.pulse = Pulse(
            ledger,
            self.confirmation,
            self.membership,
            self.holdings,
            self.recorder,
            self.intake.challenge,
            self._measure,
            self._on_open,
            self._on_taken,
            exclusive,
        )
        self.ledger_thread = LedgerThread(
            ledger,
            identity,
            self.confirmation,
            self.holdings,
            self.recorder,
            self._start_job,
            self.pulse.closed,
            exclusive,
        )
        self.duties = duties.Runner(app, stores, identity.incarnation)
        #: Celery's own handler of a message, set by the consumer.
        self.handle: Callable[[Any], None] | None = None
        #: Makes the broker's message of an envelope, set by the consumer too.
        self.message_of: Callable[[dict[str, Any]], Any] = lambda envelope: envelope
        self._to_start: deque[Any] = deque()
        self._loop = Wake()
        self._slots: Callable[[], int] = lambda: 1
        self._cold = False
        self._stopped_starting = False
        self._left = False

    # -- the life of the worker ----------------------------------------------------------------------------------

    def join(self, slots: Callable[[], int], declared: Mapping[str, Request]) -> tuple[Detected, int]:
        """Register, and start the threads. `slots` tells the size of the pool, now and later. Returns what was
        published, and how many waiting jobs were admitted at once."""
        self._slots = slots
        sys.setswitchinterval(SWITCH_INTERVAL)
        detected = detect(self.stores.settings, slots())
        capacity = detected.capacity
        self.holdings.capacity = dict(capacity.amounts)
        self.recorder.start()
        self.ledger_thread.start()
        duties.open_ledger(self.stores)
        while True:
            try:
                admitted = self.membership.register(capacity, declared, self.intake.challenge)
                break
            except LedgerClosed:
                # Another process is opening the epoch, or it changed just now.
                duties.open_ledger(self.stores)
                self._loop.wait(0.05)
        self.confirmation.start()
        self.pulse.start()
        self.intake.start()
        self.duties.start()
        atexit.register(self.leave)
        return detected, admitted

    def _measure(self) -> Capacity:
        """The capacity as it is now."""
        return detect(self.stores.settings, self._slots()).capacity

    def drain(self) -> None:
        """Safe in a signal handler."""
        self.ledger_thread.draining = True
        self.pulse.drain()
        # Celery's loop looks only now and then whether it is to stop: it is woken to do so.
        self._loop.set()

    def leave(self) -> None:
        """Settle what is over, hand back what is not, deregister. Bounded, and safe to call twice."""
        if self._left or os.getpid() != self.pid:
            return
        self._left = True
        atexit.unregister(self.leave)
        self.duties.stop(LEAVE_WITHIN)
        self.intake.stop(LEAVE_WITHIN)
        self.pulse.stop(LEAVE_WITHIN)
        self.confirmation.stop()
        for holding in self.holdings.running():
            self.ledger_thread.end(holding.job, holding.token, "handed_back", "the worker was stopped")
        self.ledger_thread.stop(LEAVE_WITHIN)
        try:
            if self.membership.registered and not self.membership.draining:
                self.membership.drain()
            self.recorder.flush(LEAVE_WITHIN)
            if self.membership.registered and not self.membership.leave():
                logger.warning("this worker still holds jobs; they are taken back when its lease runs out")
        except (PlatformError, LedgerClosed) as error:
            logger.warning("could not deregister, the lease will run out: %s", error)
        self.recorder.stop(LEAVE_WITHIN)

    def stop_cold(self) -> None:
        self._cold = True

    def stopping_cold(self) -> bool:
        return self._cold

    # -- messages ------------------------------------------------------------------------------------------------

    def arrived(self, message: Any) -> None:
        """A message of the private queue, in the main loop: nothing here waits."""
        tag = parse_tag(message.delivery_tag)
        carried = message.headers.get(HEADER) if isinstance(message.headers, dict) else None
        if tag is None or not isinstance(carried, dict):
            logger.error(
                "a message without an attempt in the private queue is set aside: %.200r", message.headers
            )
            return
        try:
            request = Request.from_shape(str(carried.get("shape")))
        except PlatformError as error:
            logger.error("a message of job %s with an unreadable request is set aside: %s", tag.job, error)
            return
        self.ledger_thread.arrive(tag, request, message)

    def _start_job(self, message: Any) -> None:
        """In the ledger thread: hand a claimed message to the main loop, or the text of one that came in a reply."""
        self._to_start.append(message)
        if self._stopped_starting:
            self.hand_back_unstarted()
        self._loop.set()

    def attach(self, hub: Any) -> None:
        hub.add_reader(self._loop.fileno(), self._start_jobs)
        self._loop.set()

    def _start_jobs(self) -> None:
        """In the main loop: what was claimed becomes requests."""
        self._loop.clear()
        while self._to_start:
            message = self._to_start.popleft()
            assert self.handle is not None, "the consumer sets it before its loop runs"
            if isinstance(message, str):
                message = self.message_of(json.loads(message))
            try:
                self.handle(message)
            except Exception as error:
                # Whatever it is, it concerns this one message.
                logger.exception("the message of %s cannot be started", message.delivery_tag)
                self.refuse(message, f"cannot be started: {error!r}")

    def stop_starting(self) -> None:
        """In the main loop, which will not run again: what was claimed and not started, now or later, goes back."""
        self._stopped_starting = True
        self.hand_back_unstarted()

    def hand_back_unstarted(self) -> None:
        """The loop will not run again: what was claimed and not started goes back."""
        while self._to_start:
            message = self._to_start.popleft()
            in_reply = isinstance(message, str)
            tag = parse_tag(json.loads(message)["properties"]["delivery_tag"] if in_reply else message.delivery_tag)
            if tag is not None:
                self.ledger_thread.end(tag.job, tag.token, "handed_back", "not started")

    def refuse(self, message: Any, error: str) -> None:
        """A message that never becomes a request ends its job."""
        tag = parse_tag(message.delivery_tag)
        if tag is not None:
            self.ledger_thread.end(tag.job, tag.token, "failed", error)

    def end_job(
        self, job: str, token: str, outcome: str, error: str | None, on_lost: Callable[[], None] | None
    ) -> bool:
        return self.ledger_thread.end(job, token, outcome, error, on_lost)

    # -- between the threads -------------------------------------------------------------------------------------

    def on_tick(self, name: str) -> None:
        """Beat's tick, in the intake's thread."""
        self.pulse.tick()
        self.duties.tick(name)

    def _on_regained(self) -> None:
        """This worker may admit again: the heartbeat fills what was released meanwhile."""
        self.pulse.tick()
        self.ledger_thread.wake()

    def _on_open(self) -> None:
        """A new epoch is open and this worker is in it."""
        self.ledger_thread.wake()


    def _on_taken(self, error: NameTaken) -> None:
        """In the pulse's thread: end as after a TERM, with an exit code that says why."""
        logger.critical("this worker ends: %s", error)
        worker_state.should_stop = EX_NAME_TAKEN
        self.drain()


def runtime_of(app: Celery) -> Runtime:
    runtime = getattr(app, "worker_runtime", None)
    if not isinstance(runtime, Runtime):
        raise PlatformError(
            "this process is not a worker of the platform", advice="Start it with `celery -A ... worker`."
        )
    return runtime
