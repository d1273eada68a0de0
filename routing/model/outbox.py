"""What the end of an attempt leaves to be delivered: results, parts of chords, and messages not yet published.

It travels with the outcome: from the process of the body to the worker, through the release script into the stream (or
straight into Postgres), and stands in the row's column `outbox` until it is delivered. So nobody waits for a store that
is down, a stale attempt's outbox is dropped with its end, and what was accepted is delivered though the worker dies.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any, Final

from celery_capacity.routing.model.job import Gates, NewJob, Rate

_TIMES: Final = ("due_at", "expires_at")
#: The outbox of a job that ended where nobody could say its result (it waited, or was lost with its worker): whoever
#: delivers it makes one of what the row says.
UNTOLD: Final = '{"publishes": [], "results": [{"untold": true}]}'
#: The same of one whose result Celery may have told with the end of another (`routing.insert.replacements`).
UNLESS_TOLD: Final = '{"publishes": [], "results": [{"untold": true, "unless_told": true}]}'
#: The same once its result is told, by a process that is no worker: events and signals come from one.
UNANNOUNCED: Final = '{"publishes": [], "results": [{"unannounced": true}]}'


@dataclass(slots=True)
class Outbox:
    """`publishes`: jobs to be inserted before the outcome. `results`: what the result backend made of results and parts
    of chords, as JSON values; only `workers.results.backends` looks into them."""

    publishes: list[NewJob] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)
    #: The attempt has ended its job itself (`routing.store.fencing`). Known between the body's process and the worker
    #: only.
    committed: bool = False
    #: The attempt has replaced its job (`Task.replace`), and ends by that. Known there only, too.
    replaced: bool = False
    #: The life of the worker that is delivering this just now: while it lives, nobody else does.
    by: str = ""
    #: Bytes of the messages in `publishes`, as far as somebody counted.
    size: int = 0

    def __bool__(self) -> bool:
        return bool(self.publishes or self.results or self.committed or self.replaced)

    def without_results(self) -> Outbox:
        return Outbox(self.publishes)

    def to_text(self) -> str:
        """As JSON; '' where it is empty."""
        if not (self.publishes or self.results):
            return ""
        # (In this order: `publishes` looks at the beginning, and whoever asks for `by` at the end.)
        said = {"by": self.by} if self.by else {}
        return json.dumps({"publishes": [_job_out(job) for job in self.publishes], "results": self.results, **said})


def parse(text: str) -> Outbox:
    """The outbox of a text that `to_text` made."""
    if not text:
        return Outbox()
    found = json.loads(text)
    if not all(isinstance(note, dict) for note in found["results"]):
        raise TypeError("a result in an outbox is no object")
    return Outbox([_job_in(job) for job in found["publishes"]], list(found["results"]), by=found.get("by", ""))


def publishes(text: str) -> bool:
    """Whether there is something to be published in the outbox of a text."""
    return bool(text) and '"publishes": []' not in text[:20]


def _job_out(job: NewJob) -> dict[str, Any]:
    values = asdict(job)
    values["message"] = base64.b64encode(job.message).decode("ascii")
    for name in _TIMES:
        values[name] = values[name] and values[name].isoformat()
    return values


def _job_in(values: Mapping[str, Any]) -> NewJob:
    found = dict(values)
    found["message"] = base64.b64decode(found["message"])
    for name in _TIMES:
        found[name] = datetime.fromisoformat(found[name]) if found[name] else None
    if gates := found.get("gates"):
        rate = gates["rate"] and Rate(**gates["rate"])
        # (There is nobody any more whom a refusal would reach.)
        found["gates"] = Gates(**{**gates, "after": tuple(gates["after"]), "rate": rate, "tolerant": True})
    return NewJob(**found)
