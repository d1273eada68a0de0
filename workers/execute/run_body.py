"""Run a body in the pool's process or thread, collect its results and messages, and return them with its value.

Celery's trace stores the result, counts the chord part and publishes the next tasks, all before the worker's main
process hears that the body is over. Here the trace collects them (`workers.process.attempts`). The main process tells
them to the ledger with the release, which is refused where the attempt has lost its lease.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from celery_capacity.routing.model.message import parse_tag
from celery_capacity.routing.model.outbox import Outbox
from celery_capacity.workers.execute.gevent_pool import Killed, was_killed
from celery_capacity.workers.logs import kept_lines
from celery_capacity.workers.process.attempts import Attempt, held
from celery_capacity.workers.process.progress import write_last
from celery_capacity.workers.supervision import job_times
from celery_capacity.workers.traces import worker


@dataclass(frozen=True, slots=True)
class Carried:
    """Value that Celery's trace returned for a body, and the outbox that is to be delivered with its end."""

    value: Any
    outbox: Outbox


class TracedPool:
    """Stand-in for the pool while Celery's request hands itself to it: the body runs inside `traced`."""

    def __init__(self, pool: Any, tag: str, incarnation: str) -> None:
        self._pool = pool
        self._tag = tag
        self._incarnation = incarnation

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)

    def apply_async(self, trace: Callable[..., Any], args: tuple[Any, ...], **options: Any) -> Any:
        if (times := job_times.of(self._incarnation)) is not None:
            times.began(self._tag, args)
        if (traces := worker.of(self._incarnation)) is not None:
            trace = traces.around(self._tag, trace, args)
        return self._pool.apply_async(traced, args=(self._tag, self._incarnation, trace, *args), **options)


def traced(tag: str, incarnation: str, trace: Callable[..., Any], *args: Any) -> tuple[Any, Any, Any]:
    """Run Celery's trace function for one attempt, and return its (failed, value, runtime).

    The value is a `Carried` where results or messages are to be delivered.
    """
    parsed = parse_tag(tag)
    assert parsed is not None, "only claimed messages become requests"
    try:
        with held(Attempt(parsed, incarnation)) as attempt, kept_lines.keeping(attempt):
            failed, value, runtime = trace(*args)
            write_last(attempt)
    except BaseException as error:
        if not was_killed(error):
            raise
        # Celery's pool would say that the body returned None.
        return False, Killed(), None
    return failed, Carried(value, attempt.outbox) if attempt.outbox else value, runtime


def unpacked(returned: tuple[Any, Any, Any]) -> tuple[tuple[Any, Any, Any], Outbox]:
    """Return the tuple that Celery's hooks expect, and the outbox to deliver."""
    failed, value, runtime = returned
    if isinstance(value, Carried):
        return (failed, value.value, runtime), value.outbox
    return returned, Outbox()
