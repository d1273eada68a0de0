"""Loop of the pool while Celery's consumer waits for its broker.

Celery connects in its main loop and sleeps between two tries. Meanwhile it neither feeds a prefork pool nor reads the
pool's answers, and no timer fires. Here a thread tries to connect (`BrokerProbe`) and the main loop goes on without a
broker (`PoolLoop`). Jobs that a release handed over, or that were pulled from Postgres, start and end.

Celery resets its loop when it loses the connection. A message that is half read from a process of the pool, or half
written to one, would be lost with the reset, and its job would never end. `PoolLoop.reset` keeps such halves.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from inspect import GEN_CLOSED, getgeneratorstate, isgenerator
from typing import Any, Final

from celery.worker import loops
from celery.worker import state as worker_state

from celery_capacity.routing import os_threads

logger = logging.getLogger(__name__)

#: Seconds between two looks at the probe where the pool is of greenlets: there the main loop has no events.
GREEN_LOOK_EVERY: Final = 0.1
#: Celery's pauses between two tries, in seconds: the first, the step, the longest.
PAUSES: Final = (2.0, 2.0, 30.0)


class BrokerProbe(os_threads.Thread):
    """Thread that tries to connect until it succeeds or its tries are over. `wake` is called after each try.

    `connection` is the probe's own. `pause`: seconds between two tries. `max_retries`: None means no limit. With a
    limit, the pauses are Celery's, so that the limit means what it means there.
    """

    def __init__(self, connection: Any, pause: float, max_retries: int | None, wake: Callable[[], None]) -> None:
        super().__init__(name="broker", daemon=True)
        self._connection = connection
        self._pause = pause
        self._max_retries = max_retries
        self._wake = wake
        self._stopped = os_threads.Event()
        #: True when no other try follows.
        self.done = False
        #: True when the last try had a connection, or failed in a way that no later try changes. The caller then tries
        #: itself, and meets the error.
        self.answers = False
        #: True when at least one try is over.
        self.tried = False

    def stop(self) -> None:
        """End at the next look. A try that is under way ends by its own time-out."""
        self._stopped.set()

    def run(self) -> None:
        logged, retries = "", 0
        while not self._stopped.is_set():
            error = self._try()
            self.answers = error is None
            self.done = self.answers or (self._max_retries is not None and retries >= self._max_retries)
            self.tried = True
            self._wake()
            if self.done:
                break
            if str(error) != logged:
                logged = str(error)
                logger.error(
                    "consumer: Cannot connect to %s: %s.\nTrying again in %.1f s; the pool goes on meanwhile.",
                    *(self._connection.as_uri(), error, self._pause_after(retries)),
                )
            self._stopped.wait(self._pause_after(retries))
            retries += 1
        self._connection.release()

    def _pause_after(self, retries: int) -> float:
        first, step, longest = PAUSES
        return self._pause if self._max_retries is None else min(first + step * retries, longest)

    def _try(self) -> BaseException | None:
        """Try each of the broker's addresses. Returns None where one answers, or for an error that a retry repeats."""
        error: BaseException | None = None
        for _ in range(max(1, len(self._connection.alt))):
            try:
                self._connection.ensure_connection(max_retries=0, reraise_as_library_errors=False)
                return None
            except self._connection.recoverable_connection_errors as failed:
                error = failed
                self._connection.maybe_switch_next()
            except Exception as failed:
                logger.info("consumer: the broker is asked no more: %r", failed)
                return None
        return error


class PoolLoop:
    """Loop of a consumer's pool, one for each consumer."""

    def __init__(self, consumer: Any) -> None:
        self._consumer = consumer
        self._hub = consumer.hub
        #: Callbacks of the connection to the broker at each turn of the loop, and the callbacks there before it.
        self._turns: set[Any] = set()
        self._before: set[Any] = set()
        #: Messages that are half read or half written: (function to add them, descriptor, generator).
        self._halves: list[tuple[Callable[..., None], int, Any]] = []
        if self._hub is not None:
            self._reset = self._hub.reset
            self._hub.reset = self.reset

    # -- messages that Celery's loop forgets -----------------------------------------------------------------------

    def connected(self) -> None:
        """Note the callbacks at each turn of a connection that was registered with the loop."""
        if self._hub is not None:
            self._turns = self._hub.on_tick - self._before

    def reset(self) -> None:
        """Forget all descriptors and callbacks, as Celery does over a lost connection, but no half message."""
        hub = self._hub
        for add, entries in ((hub.add_reader, hub.readers), (hub.add_writer, hub.writers)):
            self._halves += [(add, fd, entry[0]) for fd, entry in entries.items() if entry and isgenerator(entry[0])]
        self._reset()
        for process in getattr(getattr(self._consumer.pool, "_pool", None), "_pool", ()):
            # The end of this process was heard before the system had its exit code, so it is still in the pool, and
            # Celery would register no descriptor for it. Anew it is heard at once.
            if getattr(process, "_sentinel_poll", 0) is None:
                del process._sentinel_poll

    def resume(self) -> None:
        """Go on with half messages, after the pool was registered with the loop."""
        halves, self._halves = self._halves, []
        pool = getattr(self._consumer.pool, "_pool", None)
        for add, fd, half in halves:
            if getgeneratorstate(half) == GEN_CLOSED or pool is None:
                continue
            if half in pool._active_writers or (fd in pool._fileno_to_outq and add == self._hub.add_reader):
                add(fd, half)

    # -- without a broker ------------------------------------------------------------------------------------------

    def connect(self, connection: Any) -> None:
        """Connect, and serve the pool until the broker answers.

        Raises kombu's error where the tries that Celery is allowed are over, and any error that ends the worker.
        """
        answers = True
        while answers:
            answers = self._wait(connection)
            try:
                connection.ensure_connection(max_retries=0, reraise_as_library_errors=not answers)
            except connection.recoverable_connection_errors:
                # The broker went away again, just now.
                connection.maybe_switch_next()
            else:
                break
        if self._hub is not None:
            self._before = set(self._hub.on_tick)

    def _wait(self, connection: Any) -> bool:
        """Serve the pool until the broker answers. Returns False where no other try is allowed."""
        consumer, settings = self._consumer, self._consumer.runtime.stores.settings
        max_retries = consumer.app.conf.broker_connection_max_retries
        probe = BrokerProbe(connection.clone(), settings.due_interval, max_retries, consumer.runtime.wake_loop)
        probe.start()
        try:
            if not consumer.runtime.joining.begun:
                # A starting worker has nothing to serve. Where its broker answers at once, it is ready with the broker.
                while not probe.tried:
                    self._idle()
            if not probe.done:
                self._serve(lambda: probe.done)
        finally:
            probe.stop()
        return probe.answers

    def _idle(self) -> None:
        if self._hub is None:
            time.sleep(GREEN_LOOK_EVERY)
            worker_state.maybe_shutdown()
        else:
            self._consumer.runtime.wait_to_start(GREEN_LOOK_EVERY)

    def _serve(self, ready: Callable[[], bool]) -> None:
        consumer, hub = self._consumer, self._hub
        if consumer.event_dispatcher is not None:
            # The dispatcher's connection is as lost as the consumer's, and no send may hold up the loop.
            consumer.event_dispatcher.enabled = False
        consumer.update_strategies()
        consumer.create_task_handler()
        try:
            if hub is None:
                consumer.on_ready()
                while not ready():
                    time.sleep(GREEN_LOOK_EVERY)
                    worker_state.maybe_shutdown()
                    consumer.perform_pending_operations()
            else:
                self._run(ready)
        except SystemExit:
            # Celery's consumer is not running yet, and would leave claimed jobs as they are.
            consumer.recall()
            raise

    def _run(self, ready: Callable[[], bool]) -> None:
        consumer, hub = self._consumer, self._hub
        hub.on_tick.difference_update(self._turns)
        hub.propagate_errors = ()
        before = loops._timer_entries(hub.timer)
        consumer.controller.register_with_event_loop(hub)
        consumer.register_pool(hub)
        registered = loops._timer_entries(hub.timer) - before
        try:
            consumer.on_ready()
            loop = hub.create_loop()
            while not ready():
                worker_state.maybe_shutdown()
                try:
                    next(loop)
                except StopIteration:
                    loop = hub.create_loop()
        finally:
            loops._cancel_timer_entries(hub.timer, registered)
            # When Celery loses the connection, it cancels the timers that were added since. But time limits of jobs
            # that started here do not belong to the connection.
            consumer.timer_entries_before_start = loops._timer_entries(hub.timer)
        consumer.runtime.start_queue.detach()
        hub.reset()
