"""Celery's consumer, between the worker's private queue and its pool: messages are claimed before they become requests.

This module only wires. The decisions are in `workers.settle.settle_thread` and `workers.execute.request`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from celery.bootsteps import RUN
from celery.worker import consumer as celery_consumer
from celery.worker import state as worker_state
from kombu.asynchronous import set_event_loop
from kombu.utils.imports import symbol_by_name

from celery_capacity.routing.config.redaction import HIDDEN
from celery_capacity.workers.broker.cut_connection import cut, is_silence
from celery_capacity.workers.broker.queues import as_queue
from celery_capacity.workers.execute import readiness
from celery_capacity.workers.execute.pool import breaks_off, recall_unsent, runs_in_loop
from celery_capacity.workers.execute.pool_loop import PoolLoop
from celery_capacity.workers.execute.request import JobRequest, request_class
from celery_capacity.workers.execute.runtime import Runtime

logger = logging.getLogger(__name__)

#: Seconds between looks for dead children. Celery looks when a child's pipe closes, perhaps a moment before the kernel
#: lets the child be reaped, and then not again for 5 s. For so long the child's job would hold room that nobody uses.
CHILDREN_EVERY: Final = 0.25

#: Seconds between the events `worker-heartbeat`, unless the worker was told otherwise. Each event carries this number,
#: so that a listener waits for the next one. Celery's 2 s would be most of the cost of an idle worker.
EVENT_EVERY: Final = 60.0

#: Held while the tasks of an app name the request classes of one worker.
_naming: Final = threading.Lock()


class Consumer(celery_consumer.Consumer):
    """`worker_consumer` of an app on the platform."""

    #: Celery's flag: no connection was tried yet.
    first_connection_attempt: bool

    def __init__(self, *args: Any, worker_options: dict[str, Any] | None = None, **options: Any) -> None:
        # Workers find each other in the ledger. Gossip between all of them does not grow to a thousand workers.
        quiet = {"without_mingle": True, "without_gossip": True}
        celerys = dict(worker_options or {})
        celerys["heartbeat_interval"] = celerys.get("heartbeat_interval") or EVENT_EVERY
        super().__init__(*args, worker_options={**celerys, **quiet}, **options)
        self.pool_loop = PoolLoop(self)

    @property
    def runtime(self) -> Runtime:
        runtime: Runtime = self.controller.platform_runtime
        return runtime

    def connect(self) -> Any:
        connection = super().connect()
        self.pool_loop.connected()
        connection.consumes_nothing = True
        return connection

    def ensure_connected(self, conn: Any) -> Any:
        """Connect to the broker, and serve the pool until it answers: Celery would sleep between its tries."""
        conf = self.app.conf
        again = conf.broker_connection_retry_on_startup if self.first_connection_attempt else None
        if not (conf.broker_connection_retry if again is None else again):
            return super().ensure_connected(conn)
        if self.connection is not None:
            # The broker answered just now. If it no longer answers, the start begins anew, with the lines below.
            return conn.ensure_connection(max_retries=0, reraise_as_library_errors=False)
        self.pool_loop.connect(conn)
        self.first_connection_attempt = False
        return conn

    def cut(self) -> None:
        """Cut the connections of a broker that answers nobody, so that no use of them waits. In any thread."""
        # Celery's main loop may close either of them at any moment.
        dispatcher, connection = self.event_dispatcher, self.connection
        if dispatcher is not None:
            dispatcher.enabled = False
        for silent in (connection, getattr(dispatcher, "connection", None)):
            cut(silent)

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        if is_silence(exc) or self.runtime.reachability.lost:
            # Celery's clean-up would wait for an answer at each of its steps.
            self.cut()
        super().on_connection_error_after_connected(exc)

    def start(self) -> None:
        if not self.runtime.joining.met:
            self.runtime.joining.meet(threading.Event().wait)
        super().start()

    def update_strategies(self) -> None:
        """Make the strategies with this worker's request classes.

        A strategy keeps the class that its task names at this moment. Another worker of the app names its own classes.
        """
        runtime = self.runtime
        with _naming:
            for task in self.app.tasks.values():
                task.Request = request_class(
                    symbol_by_name(task.Request),
                    runtime.identity.incarnation,
                    runtime.end_job,
                    lambda: runtime.stops_cold,
                    runtime.announcer.later,
                )
            super().update_strategies()
        if runtime.joining.begun:
            # Tasks came meanwhile, as by `reload()` of a worker in a test: the ledger may send them here.
            runtime.declare(readiness.declarations(self.app, runtime.stores))

    def create_task_handler(self, *args: Any, **options: Any) -> Callable[[Any], None]:
        self.runtime.announcer.consumer = self
        self.runtime.start_queue.handle = super().create_task_handler(*args, **options)
        return self.runtime.arrived

    # Remote control of the queues that this worker publishes. Celery's methods would consume them beside the private
    # queue.

    def add_task_queue(
        self, queue: str, exchange: Any = None, exchange_type: Any = None, routing_key: Any = None, **options: Any
    ) -> None:
        added = as_queue(self.app.amqp.queues, queue, exchange, exchange_type, routing_key, **options)
        self.app.amqp.queues.select_add(added)
        if self.runtime.served_queues.add(added):
            logger.info("serving queue %s", added.name)

    def cancel_task_queue(self, queue: str) -> None:
        queues = self.app.amqp.queues
        queues.deselect(queue)
        name = queues.aliases[queue].name if queue in queues.aliases else queue
        if self.runtime.served_queues.cancel(name):
            logger.info("serving queue %s no more", name)

    def _update_prefetch_count(self, index: int = 0) -> None:
        """Measure the capacity anew where the pool, or the range of its autoscaler, has changed its size."""
        super()._update_prefetch_count(index)
        # Not at once: the autoscaler calls before it has its new range. Without a hub, Celery's "soon" is two seconds.
        soon = self.call_soon if self.hub is not None else partial(self.timer.call_after, 0)
        soon(self.runtime.remeasure)

    def register_with_event_loop(self, hub: Any) -> None:
        super().register_with_event_loop(hub)
        self.register_pool(hub)

    def register_pool(self, hub: Any) -> None:
        """Attach the platform to the loop, after Celery's pool was registered with it."""
        self.pool_loop.resume()
        self.runtime.start_queue.runs_bodies = runs_in_loop(self.pool)
        self.runtime.attach(hub)
        # The loop is made anew for each connection to the broker, and ends its timers with the connection.
        maintain = getattr(getattr(self.pool, "_pool", None), "maintain_pool", None)
        if maintain is not None:
            hub.call_repeatedly(CHILDREN_EVERY, maintain)

    def on_ready(self) -> None:
        """Join the platform where Celery's signal did not do so, and replace killed processes of the pool.

        Ready means that jobs can be admitted to the worker, also to a worker of `celery.contrib.testing`, which sends
        no signal. A process of the pool that was killed while the worker joined is replaced like one that is killed
        later. Celery would take the pool for one that cannot start, and end the worker.
        """
        if getattr(self.pool, "is_green", False):
            self.runtime.start_queue.runs_bodies = True
            self.runtime.attach(None)
        super().on_ready()
        if not self.runtime.joining.begun:
            # Nobody sent Celery's signal.
            readiness.join(self)
        maintain = getattr(getattr(self.pool, "_pool", None), "maintain_pool", None)
        if maintain is not None:
            maintain()

    def on_close(self) -> None:
        """Keep jobs over a lost connection. At a stop, hand back the jobs that have provably not started.

        Celery drops its messages at this point, because its broker delivers them again. Our broker does not. A job that
        was given to the pool runs to its end, and reports the end itself.
        """
        if self.blueprint.state == RUN:
            self.runtime.start_queue.detach()
            return
        self.recall()

    def recall(self) -> None:
        """Hand back jobs that have provably not started, since the main loop will not run again."""
        # Every stop drains here, since Celery sends no signal for a stop by remote control.
        self.runtime.drain()
        self.runtime.start_queue.stop()
        if self.hub is not None:
            # A stopping pool of Celery's uses the newest loop of the process, which may be another worker's.
            set_event_loop(self.hub)
        if self.controller is not None and self.controller.semaphore is not None:
            self.controller.semaphore.clear()
        recalled = recall_unsent(self.pool)
        for request in self._requests():
            if request.never_sent or request.id in recalled:
                worker_state.task_ready(request)
                request.hand_back()

    def break_off(self, signal: str) -> bool:
        """Break off the bodies that run here, and hand their jobs back; return False for a pool that cannot.

        In any thread: the main loop does it.
        """
        if not breaks_off(self.pool):
            return False
        self.runtime.announcer.later(partial(self._break_off, signal))
        return True

    def _break_off(self, signal: str) -> None:
        for request in self._requests():
            request.break_off(self.pool, signal)

    def _requests(self) -> list[JobRequest]:
        """Return the requests of this worker. Celery has those of all workers of the process in one set."""
        mine, requests = self.runtime.identity.incarnation, tuple(worker_state.reserved_requests)
        return [request for request in requests if isinstance(request, JobRequest) and request.incarnation == mine]

    # Messages that never become a request end their job here. Celery would write their bodies into the log.

    def on_unknown_task(self, body: Any, message: Any, exc: Exception) -> None:
        with self.runtime.refusing(message, f"the worker does not know this task: {exc}"):
            super().on_unknown_task(HIDDEN, message, exc)

    def on_invalid_task(self, body: Any, message: Any, exc: Exception) -> None:
        with self.runtime.refusing(message, f"invalid task: {exc}"):
            super().on_invalid_task(HIDDEN, message, exc)

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        with self.runtime.refusing(message, f"undecodable message: {exc}"):
            logger.critical(
                "a message cannot be decoded (%s, %s, %d bytes): %s",
                *(message.content_type, message.content_encoding, len(message.body), exc),
            )
            message.ack()

    def on_unknown_message(self, body: Any, message: Any) -> None:
        with self.runtime.refusing(message, "not a task message"):
            super().on_unknown_message(HIDDEN, message)


def consumer_class(base: Any) -> type:
    """Return the consumer class that the app names, with the platform's in front of it."""
    plain: type = symbol_by_name(base)
    return plain if issubclass(plain, Consumer) else type("Consumer", (Consumer, plain), {})
