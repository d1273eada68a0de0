"""The backlog in groups for people: jobs alike in request, queue, priority and tenant, each group with its reason."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

import redis
from sqlalchemy import Connection

from celery_capacity.platform.console import wording
from celery_capacity.platform.web import group_rows
from celery_capacity.platform.web.group_rows import GroupFilter, GroupRow
from celery_capacity.routing.forecast import starts
from celery_capacity.routing.inspect import explain
from celery_capacity.routing.inspect.explanation import Explanation
from celery_capacity.routing.inspect.waiting import BLOCKING, LedgerReading
from celery_capacity.routing.model.request import Request, alternatives_to_show, terms_of
from celery_capacity.routing.policy.labels import place_of
from celery_capacity.routing.policy.placement import order
from celery_capacity.routing.policy.tenants import tenant_of

#: Seconds of CPU for the reasons of groups that have none yet, in one reading, and with those that are looked up again.
PATIENCE: Final = 1.0
AGAIN: Final = 0.04
#: Seconds by the clock for all reasons of one reading: a store that hangs costs no CPU.
LONGEST: Final = 3.0
#: Waiting jobs up to which starts are estimated here. Beyond, the page of a job estimates its own.
ESTIMATED: Final = 2000

ALL: Final = GroupFilter()


class Group(dict[str, Any]):
    """A group as an object of JSON. `explanation`: the value behind its `reasons`, for other languages."""

    def __init__(self, values: Mapping[str, Any], explanation: Explanation | None) -> None:
        super().__init__(values)
        self.explanation = explanation


class WaitingGroups:
    """Reader of the groups for one picture after the other.

    The numbers are new in each. A reason costs more than all numbers where there are many workers. So each reading
    looks up the reasons of new groups, then those that are the oldest, as far as its time goes. `patience`: seconds of
    CPU for new ones.
    """

    def __init__(self, patience: float = PATIENCE) -> None:
        self._patience = patience
        self._readings = 0
        #: Groups of the last reading whose reasons there was no time for.
        self.unexamined = 0
        #: the last reading that looked up the reason of a group, and the reason
        self._reasons: dict[Any, tuple[int, Explanation | None]] = {}

    def read(
        self, connection: Connection, client: redis.Redis, settings: Any, chosen: GroupFilter = ALL
    ) -> list[Group]:
        """Return the groups that meet the conditions, those first that no worker can ever take."""
        reading = LedgerReading(client)
        rows = group_rows.read(connection, reading, chosen)
        keys = [row.key for row in rows]
        self._reasons = {key: self._reasons[key] for key in keys if key in self._reasons}
        self._readings += 1
        rules = starts.rules_of(settings) if sum(row.waiting for row in rows) <= ESTIMATED else None
        losses, ttl, halves_in = settings.most_losses, settings.worker_ttl, settings.share_halves_in
        reading.orders = [order(row.priority, row.seq) for row in rows]
        begin, until = time.thread_time(), time.monotonic() + LONGEST
        oldest_first = sorted(zip(keys, rows, strict=True), key=lambda pair: self._reasons.get(pair[0], (0, None))[0])
        for key, row in oldest_first:
            spent = time.thread_time() - begin
            if spent >= (AGAIN if key in self._reasons else self._patience) or time.monotonic() >= until:
                break
            why = explain.explain_by(reading, connection, row.first, losses, rules, ttl, halves_in)
            self._reasons[key] = self._readings, why
        self.unexamined = len(rows) - len(self._reasons)
        groups = [_group(row, self._reasons.get(key, (0, None))[1]) for key, row in zip(keys, rows, strict=True)]
        if chosen.reason is not None:
            groups = [group for group in groups if group["why"] == chosen.reason]
        return sorted(groups, key=lambda group: not group["blocked"])


def document(seen: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the object of `backlog --json` and `/api/v1/backlog`. `seen`: the object of `cluster --json`."""
    shown = {name: seen[name] for name in ("backlog", "pauses", "source", "at")}
    return {"waiting": seen["resources"]["waiting_jobs"], "groups": groups, **shown}


def _group(row: GroupRow, why: Explanation | None) -> Group:
    waits = why is not None and why.waits
    at = why.estimate.at if why is not None and why.estimate is not None else None
    values = {
        "task": row.name,
        "queue": row.queue,
        "priority": row.priority,
        "tenant": tenant_of(row.shape),
        "request": Request.from_shape(row.shape).to_people(),
        "alternatives": [request.to_people() for request in alternatives_to_show(row.shape)],
        "where": str(place_of(terms_of(row.shape))) or None,
        "waiting": row.waiting,
        "oldest_seconds": round(max(0.0, row.oldest), 3),
        "first": row.first,
        "why": why.why.value if why is not None and waits else None,
        "reasons": wording.sentences(why) if why is not None and waits else [],
        "blocked": why is not None and why.why in BLOCKING,
        "position": why.position if why is not None else None,
        "estimated_start": None if at is None else at.isoformat(),
    }
    return Group(values, why)
