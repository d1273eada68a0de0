"""Worker's side of Celery's remote control, where the platform has more to say or to do than Celery.

Celery keeps its commands in one table for the process. The commands of this module replace Celery's own there. On an
app that is not on the platform they do what Celery's do.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, Final

from celery.concurrency.base import BasePool
from celery.platforms import signals as signal_numbers
from celery.utils.functional import maybe_list
from celery.worker import control as celery_control
from celery.worker import state as worker_state
from celery.worker.control import Panel

from celery_capacity.routing.errors import PlatformError
from celery_capacity.routing.model import amounts
from celery_capacity.workers.broker.queues import as_queue
from celery_capacity.workers.execute.runtime import Runtime, runtime_of
from celery_capacity.workers.results.cancellation import TOLD, revoke_jobs, revoke_stamped

logger = logging.getLogger(__name__)

#: Seconds after a request for a heartbeat at which the heartbeat is sent again. A program that begins to hear events
#: asks for a heartbeat, and its own subscription may come later than the first answer.
AGAIN_AFTER: Final = (1.0, 5.0)

#: Signal for a process whose job is terminated, unless the caller names another.
TERM: Final = "SIGTERM"


def _in_place_of(plain: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Have a command of Celery's answered by the decorated function, which gets the worker's runtime too."""

    def put(command: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(plain)
        def chosen(state: Any, *args: Any, **options: Any) -> Any:
            runtime = runtime_of(state.consumer.controller)
            if runtime is None:
                options.pop(TOLD, None)
                return plain(state, *args, **options)
            return command(state, runtime, *args, **options)

        Panel.data[plain.__name__] = chosen
        return chosen

    return put


@_in_place_of(celery_control.heartbeat)
def heartbeat(state: Any, runtime: Runtime) -> None:
    """Send the event of a heartbeat now.

    Celery's own command would call the event good for seconds only, since Celery sends the next one after two. Here
    the events come once a minute.
    """
    consumer = state.consumer
    for seconds in (0.0, *AGAIN_AFTER):
        consumer.timer.call_after(seconds, _send_heartbeat, (consumer,))


def _send_heartbeat(consumer: Any) -> None:
    heart, dispatcher = consumer.heart, consumer.event_dispatcher
    if heart is not None and dispatcher is not None and dispatcher.enabled:
        dispatcher.send("worker-heartbeat", freq=heart.interval, **worker_state.SOFTWARE_INFO)


@_in_place_of(celery_control.revoke)
def revoke(
    state: Any,
    runtime: Runtime,
    task_id: Any,
    terminate: bool = False,
    signal: Any = None,
    told: bool = False,
    **_: Any,
) -> Any:
    """Revoke jobs on this worker, and in the rows unless the caller has done so (`told`).

    Celery's command also stores the result REVOKED, from every worker that hears it, though the job may run on another
    worker. Here the rows say which jobs the revoke ended. A caller of `app.control.revoke` has seen to the rows. For
    other callers, `celery control revoke` or a Celery without the platform, the worker does.
    """
    ids = {str(job) for job in maybe_list(task_id) or ()}
    worker_state.revoked.update(ids)
    if not told:
        runtime.recorder.call(lambda: revoke_jobs(state.app, runtime.stores, sorted(ids)))
    if not terminate:
        logger.info("Tasks flagged as revoked: %s", ", ".join(sorted(ids)))
        return celery_control.ok(f"tasks {ids} flagged as revoked")
    return _terminate(state, ids, signal)


def _terminate(state: Any, ids: Iterable[str], signal: Any) -> Any:
    signum = signal_numbers.signum(signal or TERM)
    terminated, refused = [], []
    for request in list(celery_control._find_requests_by_id(sorted(ids))):
        logger.info("Terminating %s (%s)", request.id, signum)
        try:
            request.terminate(state.consumer.pool, signal=signum)
        except NotImplementedError:
            logger.warning("job %s cannot be terminated: the pool of this worker has no processes", request.id)
            refused.append(request.id)
        else:
            terminated.append(request.id)
    if refused:
        names = ", ".join(refused)
        return {
            **celery_control.nok(f"terminate: the pool of this worker has no processes, so these go on: {names}"),
            "terminated": terminated,
            "cannot_terminate": refused,
        }
    if not terminated:
        return celery_control.ok("terminate: tasks unknown")
    return {**celery_control.ok(f"terminate: {', '.join(terminated)}"), "terminated": terminated}


@_in_place_of(celery_control.terminate)
def terminate(state: Any, runtime: Runtime, signal: Any, task_id: Any, **_: Any) -> Any:
    return revoke(state, task_id, terminate=True, signal=signal)


@_in_place_of(celery_control.revoke_by_stamped_headers)
def revoke_by_stamped_headers(
    state: Any,
    runtime: Runtime,
    headers: Any,
    terminate: bool = False,
    signal: Any = None,
    told: bool = False,
    **_: Any,
) -> Any:
    if isinstance(headers, list):
        headers = dict(header.partition("=")[::2] for header in headers)
    if not told:
        runtime.recorder.call(lambda: revoke_stamped(state.app, runtime.stores, headers))
    return celery_control.revoke_by_stamped_headers(state, headers, terminate=terminate, signal=signal)


@_in_place_of(celery_control.active_queues)
def active_queues(state: Any, runtime: Runtime) -> list[dict[str, Any]]:
    """Return the queues that the worker serves. Celery's command would name the queue that it keeps for itself."""
    return [dict(queue.as_dict(recurse=True)) for queue in runtime.served_queues.queues]


@_in_place_of(celery_control.add_consumer)
def add_consumer(state: Any, runtime: Runtime, queue: str, *args: Any, **options: Any) -> Any:
    """Serve a queue, as Celery's command does. A queue that cannot be served is refused in the answer."""
    arguments = {**dict(zip(("exchange", "exchange_type", "routing_key"), args, strict=False)), **options}
    try:
        as_queue(state.app.amqp.queues, queue, **arguments)
    except PlatformError as error:
        return {"error": str(error)}
    return celery_control.add_consumer(state, queue, **arguments)


@_in_place_of(celery_control.stats)
def stats(state: Any, runtime: Runtime, **options: Any) -> Any:
    """Return Celery's statistics with `capacity` and `allocated` in people's units, by the worker's own count."""
    book = runtime.holdings.book()
    return {
        **celery_control.stats(state, **options),
        "capacity": amounts.to_people(tuple(sorted(book.capacity.items()))),
        "allocated": amounts.to_people(tuple(sorted(book.allocated.items()))),
    }


@_in_place_of(celery_control.shutdown)
def shutdown(state: Any, runtime: Runtime, **options: Any) -> Any:
    """Shut down as after a TERM: nothing more is admitted from here on.

    For a shutdown by remote control Celery sends no `worker_shutting_down`.
    """
    runtime.stops(cold=False)
    runtime.drain()
    return celery_control.shutdown(state, **options)


@_in_place_of(celery_control.pool_restart)
def pool_restart(state: Any, runtime: Runtime, **options: Any) -> Any:
    """Restart the pool. Raises `ValueError` for a pool that cannot be restarted, where Celery says that it was."""
    pool = state.consumer.pool
    if state.app.conf.worker_pool_restarts and type(pool).restart is BasePool.restart:
        raise ValueError(f"a pool of {type(pool).__module__.rpartition('.')[2]} cannot be restarted")
    return celery_control.pool_restart(state, **options)
