"""The four checks of `verify`, and the two checks that concern one worker.

The four are registration, resources, heartbeats, and the cost of a read of the ledger.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import redis as redispy
from redis.exceptions import RedisError
from sqlalchemy import Engine

from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.inspect import overview
from celery_capacity.routing.inspect.overview import Overview, Reads
from celery_capacity.routing.ledger import keys, snapshot
from celery_capacity.routing.model import amounts
from celery_capacity.routing.model.amounts import CPUS
from celery_capacity.routing.model.states import Store

#: Number of reads of the allocated CPUs in the fourth check.
READS: Final = 1000
#: Where CPUs are allocated that no live worker holds.
LAPSED: Final = "on workers that went silent, until their jobs are taken back"


@dataclass(frozen=True, slots=True)
class Check:
    """Result of a check, with its finding in words and in numbers.

    `failure`: the statement that holds where the check did not pass, "" where the name alone is shown.
    """

    name: str
    passed: bool
    finding: str
    facts: dict[str, Any]
    failure: str = ""

    @property
    def statement(self) -> str:
        """Return the name for people: the statement of the check, or the contrary where it did not pass."""
        return self.name if self.passed or not self.failure else self.failure

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "passed": self.passed, "found": self.finding, **self.facts}


def run(client: redispy.Redis, engine: Engine, settings: Settings) -> list[Check]:
    """Run all four checks, in order. Raise StoreUnavailable if neither store answers."""
    seen = overview.read(client, engine, settings.worker_ttl)
    return [
        _registered(client, seen, settings.worker_ttl),
        _resources(seen),
        _heartbeats(seen, settings.heartbeat_interval + settings.renew_interval),
        _reads(overview.read_allocated(client, engine, READS), seen.lapsed_cpus),
    ]


def run_for(client: redispy.Redis, settings: Settings, worker: str) -> list[Check]:
    """Run the checks that concern one worker.

    They read only the worker's own key, so that every worker of a large cluster can be asked often. They ask neither
    Postgres nor other workers. Raises RedisError if the ledger does not answer.
    """
    registered, fresh_heartbeat = f"{worker} is registered, and expires", f"the heartbeat of {worker} is fresh"
    pipe = client.pipeline(transaction=False)
    pipe.hgetall(keys.view(worker))
    pipe.pttl(keys.view(worker))
    pipe.time()
    fields, ms, (seconds, microseconds) = pipe.execute()
    seen = {snapshot.text(name): snapshot.text(value) for name, value in fields.items()}
    if not seen:
        finding = f"no live worker is named {worker}: its log says why, or `celery -A platform cluster` who is there"
        absent, silent = f"worker {worker!r} is not registered", f"worker {worker!r} has no heartbeat"
        return [
            Check(registered, False, finding, {"workers": {}}, absent),
            Check(fresh_heartbeat, False, "no heartbeat", {"ages_seconds": {}}, silent),
        ]
    left = ms / 1000
    beaten = datetime.fromisoformat(seen["heartbeat_at"]).timestamp() if seen.get("heartbeat_at") else None
    age = None if beaten is None else max(0.0, seconds + microseconds / 1e6 - beaten)
    fresh = settings.heartbeat_interval + settings.renew_interval
    return [
        Check(
            registered,
            0 < left <= settings.worker_ttl,
            f"{seen.get('status', 'no status')}, {left:.0f} s left",
            {"workers": {worker: left}},
            f"the registration of worker {worker!r} does not expire in time",
        ),
        Check(
            fresh_heartbeat,
            age is not None and age <= fresh,
            "no heartbeat" if age is None else f"it is {age:.1f} s old, and may be {fresh:g} s",
            {"ages_seconds": {worker: None if age is None else round(age, 3)}},
            f"the heartbeat of worker {worker!r} is late",
        ),
    ]


def _registered(client: redispy.Redis, seen: Overview, ttl: float) -> Check:
    """Check that every live worker has its `worker:<name>` key, which expires within the TTL."""
    name = "workers are registered, and expire"
    left: dict[str, float] = {}
    if not seen.workers:
        return Check(name, False, "no live worker: start one with `celery -A platform worker`", {"workers": left})
    if seen.source != Store.LEDGER:
        return Check(name, False, seen.why or "the ledger does not answer or is cold", {"workers": left})
    pipe = client.pipeline(transaction=False)
    for worker in seen.workers:
        pipe.pttl(keys.view(worker.name))
    try:
        left = {worker.name: ms / 1000 for worker, ms in zip(seen.workers, pipe.execute(), strict=True)}
    except RedisError as error:
        return Check(name, False, f"Redis does not answer: {error}", {"workers": left})
    wrong = sorted(worker for worker, seconds in left.items() if not 0 < seconds <= ttl)
    finding = ", ".join(f"{worker} {seconds:.0f} s left" for worker, seconds in left.items())
    if wrong:
        finding = f"without a key that expires within {ttl:g} s: {', '.join(wrong)}"
    return Check(name, not wrong, finding, {"workers": left})


def _resources(seen: Overview) -> Check:
    """Check that the totals are present and add up."""
    total, allocated, available = seen.total(CPUS), seen.allocated(CPUS), seen.available(CPUS)
    finding = (
        f"total {amounts.format_cpus(total)} CPUs, allocated {amounts.format_cpus(allocated)},"
        f" available {amounts.format_cpus(available)}, utilisation {seen.utilization_percent:g}%"
    )
    if seen.lapsed_cpus:
        finding += f"; {amounts.format_cpus(seen.lapsed_cpus)} more {LAPSED}"
    facts = {
        "total_cpus": amounts.cpus_number(total),
        "allocated_cpus": amounts.cpus_number(allocated),
        "available_cpus": amounts.cpus_number(available),
        "utilization_percent": seen.utilization_percent,
        "source": seen.source,
    }
    return Check("resources add up", total > 0 and 0 <= allocated <= total, finding, facts)


def _heartbeats(seen: Overview, fresh: float) -> Check:
    """Check that every live worker was heard in the last `fresh` seconds.

    That is one tick of beat plus one tick of the worker's own timer.
    """
    ages = {worker.name: worker.heartbeat_age for worker in seen.workers}
    late = sorted(name for name, age in ages.items() if age is None or age > fresh)
    known_ages = [age for age in ages.values() if age is not None]
    if not ages:
        finding = "no live worker"
    elif late:
        finding = f"not heard for more than {fresh:g} s: {', '.join(late)}"
    else:
        finding = f"the oldest is {max(known_ages):.1f} s old, and may be {fresh:g} s"
    shown = {name: None if age is None else round(age, 3) for name, age in ages.items()}
    return Check("heartbeats are fresh", bool(ages) and not late, finding, {"ages_seconds": shown})


def _reads(reads: Reads, lapsed_cpus: int) -> Check:
    """Check that Redis answers every read of the allocated CPUs. Their duration is reported and not judged."""
    of_these = f", {amounts.format_cpus(lapsed_cpus)} of them {LAPSED}" if lapsed_cpus else ""
    finding = (
        f"{reads.times:,} reads took {reads.seconds * 1000:.1f} ms,"
        f" {reads.share_percent:g}% answered by Redis ({reads.value} CPUs allocated{of_these})"
    )
    facts = {
        "reads": reads.times,
        "milliseconds": round(reads.seconds * 1000, 3),
        "answered_by_redis_percent": reads.share_percent,
        "allocated_cpus": reads.value,
    }
    return Check("allocated CPUs are read from Redis", reads.answered == reads.times, finding, facts)
