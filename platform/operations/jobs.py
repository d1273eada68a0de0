"""Actions on jobs: cancel, retry, and another priority."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from celery_capacity.platform.operations.auditing import audited
from celery_capacity.routing.database.audit import Actor
from celery_capacity.routing.errors import InvalidRequest, PlatformError
from celery_capacity.workers.client import cancel as cancelling
from celery_capacity.workers.client import priorities
from celery_capacity.workers.client.cancel import Cancellation
from celery_capacity.workers.client.priorities import Reprioritized
from celery_capacity.workers.client.retry import retry

if TYPE_CHECKING:
    from celery import Celery

    from celery_capacity.workers.process.stores import Stores

#: The conditions by which jobs were chosen, for the audit.
Chosen = Mapping[str, Any]
NO_CONDITION: Final[Chosen] = {}


@dataclass(frozen=True, slots=True)
class Retried:
    """A job that was to be retried: the id of its retry, or why there is none."""

    job: str
    retried_as: str | None = None
    refused: PlatformError | None = None

    def to_json(self) -> dict[str, Any]:
        problem = self.refused and {"reference": self.refused.reference, "detail": str(self.refused)}
        return {"id": self.job, "retried_as": self.retried_as, "refused": problem}


def cancel(
    app: Celery,
    stores: Stores,
    actor: Actor,
    ids: Sequence[str],
    *,
    terminate: bool = False,
    chosen: Chosen = NO_CONDITION,
) -> Iterator[Cancellation]:
    """Cancel jobs, and yield what became of each, as `workers.client.cancel`."""
    with audited(stores, actor, "cancel", ids, {**chosen, "terminate": terminate}) as note:
        results = []
        try:
            for result in cancelling.cancel(app, stores, ids, terminate=terminate):
                results.append(result)
                yield result
        finally:
            # Also where a store went away between two jobs, or where the reader of the results did.
            note.count([result.became.value for result in results], sum(not result.done for result in results))


def retry_all(
    app: Celery, stores: Stores, actor: Actor, ids: Sequence[str], *, again: bool = False, chosen: Chosen = NO_CONDITION
) -> Iterator[Retried]:
    """Retry jobs one by one. After an error that would meet each of them, such as a full backlog, stop trying."""
    with audited(stores, actor, "retry", ids, {**chosen, "again": again}) as note:
        stopped: PlatformError | None = None
        words = []
        try:
            for job in ids:
                result = Retried(job, refused=stopped) if stopped is not None else _retry(app, stores, job, again)
                stopped = None if isinstance(result.refused, InvalidRequest) else result.refused
                words.append("retried" if result.refused is None else result.refused.reference)
                yield result
        finally:
            note.count(words, sum(word != "retried" for word in words))


def _retry(app: Celery, stores: Stores, job: str, again: bool) -> Retried:
    try:
        return Retried(job, retry(app, stores, job, again=again))
    except PlatformError as error:
        return Retried(job, refused=error)


def set_priority(
    stores: Stores, actor: Actor, ids: Sequence[str], priority: int, *, reason: str | None = None
) -> list[Reprioritized]:
    """Give jobs a priority, and return what became of each, as `workers.client.priorities`."""
    with audited(stores, actor, "priority", ids, {"priority": priority, "reason": reason}) as note:
        results = priorities.set_priority(stores, ids, priority, reason=reason, by=actor.name)
        ended = sum(result.became is priorities.Became.ENDED_BEFORE for result in results)
        note.count([result.became.value for result in results], ended)
        return results
