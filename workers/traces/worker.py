"""Traces of the workers of this process. Where `PLATFORM_TRACES` is off there are none, and calls return at once.

The pool's process or thread makes the spans of a body and of the time before it. The main process makes the span of the
result: it hears when the store that decides has the end. Each span is made where it ends, by the API of OpenTelemetry.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from celery_capacity.routing.ledger.replies import Ended
from celery_capacity.routing.model.message import parse_tag
from celery_capacity.routing.model.token import Token
from celery_capacity.workers.process.attempts import Attempt
from celery_capacity.workers.process.holdings import Holding, Holdings
from celery_capacity.workers.traces.guard import guarded

if TYPE_CHECKING:
    from opentelemetry.context import Context

    from celery_capacity.workers.traces.spans import Admission

#: Seconds for the last spans of a process of the pool that ends.
LAST_WITHIN: Final = 2.0
#: Nanoseconds of a millisecond.
_MS: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class _Open:
    """Attempt whose body was given to the pool. `headers`: those with its context. `over_ns`: end of its body."""

    admission: Admission
    headers: dict[str, str]
    over_ns: int


class WorkerTraces:
    """Traces of one worker. Thread-safe. `now_ms`: returns the time by the clock of the store that decides."""

    def __init__(self, name: str, holdings: Holdings, now_ms: Callable[[], int]) -> None:
        self._name = name
        self._holdings = holdings
        self._now_ms = now_ms
        self._open: dict[tuple[str, Token], _Open] = {}

    def around(self, tag: str, trace: Callable[..., Any], args: tuple[Any, ...]) -> Callable[..., Any]:
        """Return Celery's trace function with the spans of an attempt around it, for a call with these arguments."""
        parsed = parse_tag(tag)
        holding = None if parsed is None else self._holdings.find(parsed.job, parsed.token)
        if holding is None:
            return trace
        return guarded(self._around, holding, trace, args) or trace

    def _around(self, holding: Holding, trace: Callable[..., Any], args: tuple[Any, ...]) -> Callable[..., Any]:
        from celery_capacity.workers.traces import spans

        # The times of a holding are by the store's clock, those of a span by the clock of its process.
        now = time.time_ns()
        ahead = self._now_ms() * _MS - now
        admitted, claimed = (ms * _MS - ahead if ms else now for ms in (holding.admitted_ms, holding.started_ms))
        attempt = holding.token.attempt
        admission = spans.Admission(self._name, attempt, holding.request.to_people(), admitted, claimed)
        self._open[holding.key] = _Open(admission, spans.carried(args[2]), now)
        return partial(spans.running, admission, trace)

    def over(self, job: str, token: Token) -> None:
        """Note that the body of an attempt is over."""
        attempt = self._open.get((job, token))
        if attempt is not None:
            self._open[job, token] = replace(attempt, over_ns=time.time_ns())

    def stored(self, end: Ended) -> None:
        """Make the span of the result of an attempt, whose end the deciding store has."""
        attempt = self._open.pop((end.job, end.token), None)
        if attempt is not None:
            from celery_capacity.workers.traces import spans

            times = attempt.over_ns, time.time_ns()
            guarded(spans.ended, attempt.headers, attempt.admission, end.outcome, end.error, times)

    def context_of(self, job: str, token: Token) -> Context | None:
        """Return the context that the message of an attempt brought."""
        from celery_capacity.workers.traces import spans

        attempt = self._open.get((job, token))
        return None if attempt is None else guarded(spans.extracted, attempt.headers)


#: Traces of the workers of this process, by incarnation. A process of the pool has them from its parent.
_workers: Final[dict[str, WorkerTraces]] = {}


def begin(incarnation: str, traces: WorkerTraces) -> None:
    """Trace the jobs of a worker. Called before the pool forks."""
    _workers[incarnation] = traces


def end(incarnation: str) -> None:
    """Trace no more jobs of a worker that ends."""
    _workers.pop(incarnation, None)


def of(incarnation: str) -> WorkerTraces | None:
    """Return the traces of a worker, None where it makes none."""
    return _workers.get(incarnation) if _workers else None


def context_of(attempt: Attempt) -> Context | None:
    """Return the context that the message of an attempt brought, for what its worker's main process publishes."""
    traces = of(attempt.incarnation)
    return None if traces is None else traces.context_of(attempt.tag.job, attempt.tag.token)


def injected() -> dict[str, str]:
    """Return the headers of this thread's context; empty where this process makes no traces."""
    if not _workers:
        return {}
    from celery_capacity.workers.traces import spans

    return guarded(spans.injected) or {}


def continuing(headers: object) -> AbstractContextManager[None]:
    """Return the block within which this thread has the context of headers that `injected` returned."""
    if not (_workers and isinstance(headers, dict)):
        return nullcontext()
    from celery_capacity.workers.traces import spans

    return spans.continuing(headers)


def flush_traces(**_: Any) -> None:
    """Export the last spans of a process of the pool that ends."""
    if _workers:
        from celery_capacity.workers.traces import spans

        guarded(spans.flush, LAST_WITHIN)
