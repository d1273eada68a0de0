"""Outbox of an attempt: the results, chord parts and unpublished messages that its end leaves to be delivered.

The outbox travels with the outcome: from the process of the body to the worker, and through the release script into the
stream, or straight into Postgres. It stands in the row's column `outbox` until it is delivered. So nobody waits for a
store that is down. A stale attempt's outbox is dropped with its end. Accepted results and messages are delivered though
the worker dies.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any, Final

from celery_capacity.routing.model.job import Constraints, NewJob, Rate
from celery_capacity.routing.model.request import run_time_of

_TIMES: Final = ("due_at", "expires_at")
#: Name of a job's constraints in the text of an outbox. Workers of all versions read it.
_CONSTRAINTS: Final = "gates"
#: Outbox of a job that ended where no process could say its result: it waited, or was lost with its worker. The process
#: that delivers the outbox makes a result of the row.
UNTOLD: Final = '{"publishes": [], "results": [{"untold": true}]}'
#: Like `UNTOLD`, for a job whose result Celery may have told with another job's end (`routing.insert.replacements`).
UNLESS_TOLD: Final = '{"publishes": [], "results": [{"untold": true, "unless_told": true}]}'
#: Like `UNTOLD`, once a process that is no worker has told the result. A worker still sends the events and signals.
UNANNOUNCED: Final = '{"publishes": [], "results": [{"unannounced": true}]}'


@dataclass(slots=True)
class Outbox:
    """Jobs and results that an attempt leaves to be delivered.

    `publishes`: jobs to be inserted before the outcome. `results`: results and chord parts in the result backend's
    form, as JSON values; only `workers.results.backends` looks into them.
    """

    publishes: list[NewJob] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)
    #: The attempt has ended its job itself (`routing.store.fencing`). Only the body's process and the worker know this.
    committed: bool = False
    #: The attempt has replaced its job (`Task.replace`), and ends by that. Only these two know this as well.
    replaced: bool = False
    #: Incarnation of the worker that delivers this outbox now. While that worker lives, nobody else delivers it.
    by: str = ""
    #: Bytes of the messages in `publishes`, as far as they were counted.
    size: int = 0

    def __bool__(self) -> bool:
        return bool(self.publishes or self.results or self.committed or self.replaced)

    def to_text(self) -> str:
        """Return the outbox as JSON, '' where it is empty."""
        if not (self.publishes or self.results):
            return ""
        # Keep this order: `publishes` looks at the beginning of the text, and a reader of `by` at its end.
        worker = {"by": self.by} if self.by else {}
        return json.dumps({"publishes": [_job_out(job) for job in self.publishes], "results": self.results, **worker})


def parse(text: str) -> Outbox:
    """Return the outbox of a text that `to_text` made."""
    if not text:
        return Outbox()
    content = json.loads(text)
    if not all(isinstance(note, dict) for note in content["results"]):
        raise TypeError("a result in an outbox is no object")
    return Outbox([_job_in(job) for job in content["publishes"]], list(content["results"]), by=content.get("by", ""))


def publishes(text: str) -> bool:
    """Return True if the outbox of a text has something to publish."""
    return bool(text) and '"publishes": []' not in text[:20]


def _job_out(job: NewJob) -> dict[str, Any]:
    values = asdict(job)
    values[_CONSTRAINTS] = values.pop("constraints")
    # An older worker fails on another name. The class of the time is in the shape.
    del values["expected_ms"]
    if job.key_limits is None:
        del values["key_limits"]
    if not job.priority_given:
        del values["priority_given"]
    values["message"] = base64.b64encode(job.message).decode("ascii")
    for name in _TIMES:
        values[name] = values[name] and values[name].isoformat()
    return values


def _job_in(values: Mapping[str, Any]) -> NewJob:
    fields = dict(values)
    fields["message"] = base64.b64decode(fields["message"])
    fields["expected_ms"] = run_time_of(fields["shape"]).expected
    for name in _TIMES:
        fields[name] = datetime.fromisoformat(fields[name]) if fields[name] else None
    if constraints := fields.pop(_CONSTRAINTS, None):
        rate = constraints["rate"] and Rate(**constraints["rate"])
        # Be tolerant: nobody is there any more to hear of a refusal.
        fields["constraints"] = Constraints(
            **{**constraints, "after": tuple(constraints["after"]), "rate": rate, "tolerant": True}
        )
    return NewJob(**fields)
