"""The explanation of a job as a value, and its JSON. Its words are made where it is shown."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from celery_capacity.routing.forecast.starts import EstimatedStart
from celery_capacity.routing.insert.key_lines import HeldBy
from celery_capacity.routing.model import amounts
from celery_capacity.routing.model.amounts import CPUS
from celery_capacity.routing.model.reasons import Reason
from celery_capacity.routing.model.request import Request, alternatives_of
from celery_capacity.routing.model.states import State
from celery_capacity.routing.policy.missing import Missing, Unblocking
from celery_capacity.routing.policy.tenants import Sharing, tenant_of
from celery_capacity.routing.store.controls import Cordon, Pause


@dataclass(frozen=True, slots=True)
class OverQuota:
    """An alternative of a job that the quota of its tenant holds back, and what is left of the resource there."""

    request: Request
    resource: str
    asked: int
    free: int

    def to_json(self) -> dict[str, Any]:
        return {
            "request": self.request.to_people(),
            "resource": self.resource,
            "asked": _number(self.resource, self.asked),
            "free": _number(self.resource, self.free),
        }


@dataclass(frozen=True, slots=True)
class Explanation:
    """The reason why a job is where it is.

    `resource`, `asked` and `free` (millicores, bytes or counts) tell the shortage on the worker (`worker`) that comes
    closest. For `too-large`, `free` is the largest amount that there is, and `worker` has it.

    `place` is the job's place, from 1, among the jobs with an equal request. `before` is the number of all waiting jobs
    that come earlier in order, for any request. `position` is the number of those that would start before it: without
    the jobs that are paused, and those that no registered worker could ever take. Among tenants it goes by their turns.
    """

    job: str
    state: State
    why: Reason
    request: Request
    declared: bool
    resource: str | None = None
    asked: int | None = None
    free: int | None = None
    worker: str | None = None
    place: int | None = None
    before: int | None = None
    position: int | None = None
    due_at: datetime | None = None
    #: workers that would have room if they were empty
    large_enough: int | None = None
    live_workers: int | None = None
    #: the jobs that must succeed first, at most `SHOWN_NEEDS`
    needs: tuple[str, ...] = ()
    #: the rate of its task, as somebody wrote it
    rate: str | None = None
    #: the key that holds it back
    key: HeldBy | None = None
    #: the shortage on each of the closest workers, at most `SHOWN_WORKERS`, and the number of the other workers
    missing: tuple[Missing, ...] = ()
    more_missing: int = 0
    #: the running jobs whose ends would make room soonest
    unblocked_by: Unblocking | None = None
    #: the pause that holds it back
    pause: Pause | None = None
    #: the cordon of the worker that would take it
    cordon: Cordon | None = None
    #: the estimated start of a job that waits for room; None where nobody asked for it
    estimate: EstimatedStart | None = None
    #: the tenant that comes first, or whose quota is reached
    tenant: str | None = None
    #: each alternative that the quota holds back, where the job has several
    over_quota: tuple[OverQuota, ...] = ()
    #: the labels and the worker that it asks for, in words; None for none
    where: str | None = None
    #: True: the job itself asks to be alone on its worker
    exclusive: bool = False
    #: the values that workers have of the labels that no worker has as asked, in words
    labels: str | None = None

    @property
    def waits(self) -> bool:
        """Return whether the job waits: it neither runs nor has ended."""
        return self.why not in (Reason.RUNS, Reason.ENDED)

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "why": self.why.value,
            "request": self.request.to_people(),
            "asked": _number(self.resource, self.asked),
            "free": _number(self.resource, self.free),
            "due_at": None if self.due_at is None else self.due_at.astimezone(UTC).isoformat(),
            "key": None if self.key is None else self.key.to_json(),
            "missing": [_missing(line) for line in self.missing],
            "pause": None if self.pause is None else self.pause.to_json(),
            "cordon": None if self.cordon is None else self.cordon.to_json(),
            "estimate": None if self.estimate is None else self.estimate.to_json(),
            "tenant": self.tenant,
            "over_quota": [line.to_json() for line in self.over_quota],
        }


def _missing(line: Missing) -> dict[str, Any]:
    """Return the JSON of what a worker lacks, in people's units."""
    rooms = [
        {
            "resource": room.resource,
            "asked": _number(room.resource, room.asked),
            "free": _number(room.resource, room.free),
            "total": _number(room.resource, room.total),
        }
        for room in line.rooms
    ]
    return {"worker": line.worker, "admits": line.admits, "alone": line.alone, "resources": rooms}


def _number(resource: str | None, amount: int | None) -> int | float | None:
    return amounts.cpus_number(amount) if amount is not None and resource == CPUS else amount


def over_quota(job: str, row: Any, sharing: Sharing) -> Explanation:
    """Explain a job that the quota of its tenant holds back, by the first of the alternatives that it does not allow.

    Each of them is told where the job has several.
    """
    tenant, alternatives = tenant_of(row.shape), alternatives_of(row.shape)
    quota, used = sharing.rule(tenant).quota, sharing.used.get(tenant, {})
    exceeded = [
        OverQuota(request, resource, request.get(resource), quota[resource] - used.get(resource, 0))
        for request in alternatives
        if (resource := sharing.exceeded(tenant, request))
    ]
    return Explanation(
        job,
        State(row.state),
        Reason.TENANT_QUOTA,
        exceeded[0].request,
        row.declared,
        resource=exceeded[0].resource,
        asked=exceeded[0].asked,
        free=exceeded[0].free,
        tenant=tenant,
        over_quota=tuple(exceeded) if len(alternatives) > 1 else (),
    )
