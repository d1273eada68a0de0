"""Celery's remote control about queues, where it would speak of the queue that this worker keeps for itself.

The commands stand in a table of the process. A worker that is not of the platform gets Celery's own commands.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from celery.worker import control

from celery_capacity.routing.errors import PlatformError
from celery_capacity.workers.broker.queues import as_queue
from celery_capacity.workers.execute.runtime import Runtime, runtime_of


def connect() -> None:
    """Put the commands into the table, once."""
    if control.Panel.data["active_queues"] is control.active_queues:
        control.Panel.data["active_queues"] = _instead(control.active_queues, _active_queues)
        control.Panel.data["add_consumer"] = _instead(control.add_consumer, _add_consumer)


def _instead(celerys: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    def command(state: Any, *args: Any, **options: Any) -> Any:
        runtime = runtime_of(state.consumer.controller)
        if runtime is None:
            return celerys(state, *args, **options)
        return ours(runtime, state, *args, **options)

    return command


def _active_queues(runtime: Runtime, state: Any) -> list[dict[str, Any]]:
    """Return the queues that the worker serves."""
    return [dict(queue.as_dict(recurse=True)) for queue in runtime.serving.queues]


def _add_consumer(runtime: Runtime, state: Any, queue: str, *args: Any, **options: Any) -> Any:
    """Serve a queue, as Celery's command does. A queue that cannot be served is refused in the answer."""
    names = ("exchange", "exchange_type", "routing_key")
    arguments = {**dict(zip(names, args, strict=False)), **options}
    try:
        as_queue(state.app.amqp.queues, queue, **arguments)
    except PlatformError as error:
        return {"error": str(error)}
    return control.add_consumer(state, queue, **arguments)
