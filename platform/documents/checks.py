"""Checks of the stores: `verify` and `reconcile`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from celery_capacity.platform.documents.cluster import Source
from celery_capacity.platform.documents.parts import Amount, Closed, EstimateErrors, Natural, Positive, Unreadable

Passed = Annotated[bool, Field(description="whether it passed")]
Found = Annotated[str, Field(description="what was found, in words")]
Seconds = Annotated[float, Field(description="seconds")]
Age = Annotated[Amount | None, Field(description="seconds; null where nobody noted one")]


class Verdict(Closed):
    """An invariant."""

    name: Literal["I1", "I2", "I3", "I4", "I6"] = Field(description="its name")
    says: str = Field(description="what it says, in words")
    holds: bool | None = Field(description="null where it was not judged: it holds only at rest, and work runs")
    only_at_rest: bool = Field(description="whether it holds only at rest")
    violations: Natural = Field(description="how many things violate it")
    detail: Annotated[list[str], Field(max_length=10)] = Field(description="the first ten of them, in words")


class Invariants(Closed):
    """The verdicts over both stores."""

    at_rest: bool = Field(description="whether nothing waited or ran")
    holds: bool = Field(description="whether all that could be judged holds")
    verdicts: Annotated[list[Verdict], Field(min_length=5, max_length=5)] = Field(description="one for each invariant")
    estimates: EstimateErrors | None = Field(
        description="how wrong estimated starts were; null: none has been compared"
    )


class RegisteredCheck(Closed):
    """Check that workers are registered, and expire."""

    name: Literal["workers are registered, and expire"] = Field(description="its name")
    passed: Passed
    found: Found
    workers: dict[str, Seconds] = Field(
        description="seconds until the key of each live worker expires; negative where it does not or is not there"
    )


class SumsCheck(Closed):
    """Check that resources add up."""

    name: Literal["resources add up"] = Field(description="its name")
    passed: Passed
    found: Found
    total_cpus: Amount = Field(description="CPUs published")
    allocated_cpus: Amount = Field(description="CPUs held by admitted jobs")
    available_cpus: Amount = Field(description="CPUs free")
    utilization_percent: Amount = Field(description="allocated CPUs in percent of all")
    source: Source


class HeartbeatsCheck(Closed):
    """Check that heartbeats are fresh."""

    name: Literal["heartbeats are fresh"] = Field(description="its name")
    passed: Passed
    found: Found
    ages_seconds: dict[str, Age] = Field(description="seconds since the last heartbeat of each live worker")


class ReadsCheck(Closed):
    """Check that allocated CPUs are read from Redis."""

    name: Literal["allocated CPUs are read from Redis"] = Field(description="its name")
    passed: Passed
    found: Found
    reads: Natural = Field(description="reads in one pipeline")
    milliseconds: Amount = Field(description="milliseconds for all of them")
    answered_by_redis_percent: Annotated[float, Field(ge=0, le=100)] = Field(
        description="reads that Redis answered, in percent"
    )
    allocated_cpus: Annotated[str, Field(pattern=r"^\d+(\.\d+)?$")] = Field(
        description="the value that was read: CPUs as text"
    )


class RegisteredCheckOfWorker(Closed):
    """Check that one worker is registered, and expires."""

    name: Annotated[str, Field(pattern=" is registered, and expires$")] = Field(
        description="its name, with that of the worker"
    )
    passed: Passed
    found: Found
    workers: dict[str, Seconds] = Field(
        description="seconds until its key expires; without the worker where there is none"
    )


class HeartbeatCheckOfWorker(Closed):
    """Check that the heartbeat of one worker is fresh."""

    name: Annotated[str, Field(pattern="^the heartbeat of .* is fresh$")] = Field(
        description="its name, with that of the worker"
    )
    passed: Passed
    found: Found
    ages_seconds: dict[str, Age] = Field(
        description="seconds since its last heartbeat; without the worker where there is none"
    )


class Verification(Closed):
    """Four checks, and the invariants."""

    ok: bool = Field(description="whether all checks passed and the invariants hold; the exit code is 0 then, else 1")
    passed: Annotated[int, Field(ge=0, le=4)] = Field(description="checks that passed")
    checks: (
        tuple[RegisteredCheck, SumsCheck, HeartbeatsCheck, ReadsCheck]
        | tuple[RegisteredCheckOfWorker, HeartbeatCheckOfWorker]
    ) = Field(description="the four checks, in this order; with --worker two of them, of that worker")
    invariants: Invariants | None = Field(description="null where a store does not answer, and with --worker")
    not_judged: str | None = Field(description="why the invariants were not judged; null where they were")
    quarantine: Unreadable | None = Field(description="null where Postgres does not answer, and with --worker")


class Rebuilt(Closed):
    """A cold ledger that was opened."""

    epoch: Positive = Field(description="the epoch that was opened")
    workers: Natural = Field(description="workers that it knows")
    held: Natural = Field(description="jobs that workers hold")
    filed: Natural = Field(description="waiting jobs that were filed")


class Reconciled(Closed):
    """Differences between Redis and Postgres, and how many were repaired."""

    applied: Natural = Field(description="transitions of the ledger that Postgres did not have and has now")
    checked: Natural = Field(description="jobs that were compared")
    drift: Natural = Field(description="differences that were found")
    repaired: Natural = Field(description="differences that were repaired")
    kinds: dict[str, Annotated[int, Field(ge=1, description="how many")]] = Field(
        description="differences by kind, in words"
    )
    all_repaired: bool = Field(description="whether none is left; the exit code is 0 then, else 1")


class PrintedReconcile(Reconciled):
    """Differences between Redis and Postgres, and how many were repaired."""

    rebuilt: Rebuilt | None = Field(description="null unless the ledger was cold and was opened first")
