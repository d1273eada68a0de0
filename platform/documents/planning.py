"""Replays and forecasts: `demo`, `simulate` and `whatif`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from celery_capacity.platform.documents.checks import Invariants
from celery_capacity.platform.documents.cluster import Alternatives
from celery_capacity.platform.documents.parts import Amount, Amounts, Closed, Natural, Positive, Time, Waits
from celery_capacity.routing.model.states import State, Store


class ReplayWaits(Closed):
    """Waits of the jobs of a replay."""

    mean: Amount = Field(description="seconds")
    p95: Amount = Field(description="seconds")
    max: Amount = Field(description="seconds")


class ReplayWorker(Closed):
    """A worker of a replay."""

    name: str = Field(description="its name")
    cpus: Amount | None = Field(description="CPUs that it publishes; null for another's worker that left")
    peak_cpus: Amount = Field(description="the most CPUs that running jobs held at once")
    average_cpus: Amount = Field(
        description="CPUs that running jobs held on average, from the first submission to the last end"
    )
    jobs: Natural = Field(description="jobs that ran there")


class Compared(Closed):
    """A figure of a forecast beside the outcome."""

    predicted: Amount | None = Field(description="by the forecast; null: a job was never to start")
    real: Amount | None = Field(description="as it happened")


class ReplayForecast(Closed):
    """A forecast at whose moment a job waited."""

    at_seconds: float = Field(description="its moment, from the first submission")
    waiting: Positive = Field(description="jobs of the replay that waited then")
    guessed: Natural = Field(description="jobs whose run time was unknown, and taken to be the median")
    empty_seconds: Compared = Field(description="until none of these jobs waited")
    wait_mean_seconds: Compared = Field(
        description="the mean wait from then on, of these jobs that were to start; null: none was"
    )


class ReplayError(Closed):
    """A job of a replay that did not succeed."""

    job: Natural = Field(description="its row in the trace, from 0")
    state: State = Field(description="its state")
    error: str = Field(description="its error")


class Replay(Closed):
    """A finished replay."""

    trace: str = Field(description="name of the trace")
    scale: Amount = Field(description="how many times faster than the trace it was")
    jobs: Positive = Field(description="jobs of the trace")
    states: dict[State, Annotated[int, Field(ge=1, description="how many")]] = Field(
        description="jobs by state at the end"
    )
    makespan_seconds: Amount = Field(description="seconds from the first submission to the last end")
    wait_seconds: ReplayWaits = Field(description="seconds from a job's submission to the start of its task")
    submission_delay_seconds: Amount = Field(description="seconds that the latest submission came after its time")
    workers: list[ReplayWorker] = Field(description="what ran on each worker")
    forecasts: Annotated[list[ReplayForecast], Field(max_length=10)] | None = Field(
        description="forecasts of `whatif` made meanwhile, beside the outcome; null without --whatif"
    )
    run_twice: list[Natural] = Field(description="jobs that ran more than once, by their row in the trace from 0")
    errors: Annotated[list[ReplayError], Field(max_length=5)] = Field(
        description="the first five jobs that did not succeed"
    )
    invariants: Invariants
    ok: bool = Field(
        description="whether every job ran once, no worker held more than it has, and the invariants hold; the exit"
        " code is 0 then, else 1"
    )


class SimulatedWorker(Closed):
    """A worker of a simulation."""

    name: str = Field(description="its name")
    cpus: Amount = Field(description="CPUs that it has")
    average_cpus: Amount = Field(
        description="CPUs that running jobs held on average, from the first submission to the last end"
    )
    jobs: Natural = Field(description="jobs that ran there")


class SimulatedTenant(Closed):
    """A tenant of a simulation."""

    tenant: str = Field(description="the tenant")
    starts: Natural = Field(description="jobs of the tenant that start")
    wait_seconds: Waits | None = Field(
        description="seconds from the submission of its jobs to their starts; null where none starts"
    )


class Simulation(Closed):
    """A finished simulation."""

    trace: str = Field(description="name of the trace")
    scale: Amount = Field(description="how many times faster than the trace it was")
    jobs: Positive = Field(description="jobs of the trace")
    never: Natural = Field(description="jobs that no worker could ever take")
    depth: Natural = Field(description="blocked requests that get a reservation; 0 is none")
    reserve_after_seconds: Amount = Field(
        description="seconds for which a job is blocked before a worker is kept for it"
    )
    expected: Literal["exact", "learned", "recorded", "none"] = Field(description="source of the expected run times")
    makespan_seconds: Amount = Field(description="seconds from the first submission to the last end")
    makespan_least_seconds: Amount = Field(description="seconds that any order of the jobs takes at least")
    packing: Amount = Field(description="the makespan over the least one; 1 is perfect")
    wait_seconds: Waits = Field(description="seconds from a job's submission to its start")
    overruns: Natural = Field(
        description="reserved starts that passed before the job could start, because others ran longer than expected"
    )
    kept: Natural = Field(description="workers that were kept for a job that was blocked for too long")
    workers: list[SimulatedWorker] = Field(description="what ran on each worker")
    tenants: list[SimulatedTenant] = Field(description="the tenants, by name; empty where tenants are not in use")


class ForecastOfKind(Closed):
    """The waiting jobs of one task and request."""

    task: str = Field(description="the task; empty for one that every worker knows")
    request: Amounts
    alternatives: Alternatives
    starts: Natural = Field(description="jobs that start")
    never: Natural = Field(description="jobs that never start: no worker takes them, or a run time is unknown")
    wait_seconds: Waits | None = Field(description="seconds from now to the start of the jobs; null: none starts")


class ForecastOfTenant(Closed):
    """The waits of one tenant."""

    tenant: str = Field(description="the tenant")
    starts: Natural = Field(description="jobs that start")
    never: Natural = Field(description="jobs that never start: no worker takes them, or a run time is unknown")
    wait_seconds: Waits | None = Field(description="seconds from now to the start of the jobs; null: none starts")


class Forecast(Closed):
    """A forecast of the backlog."""

    workers: Natural = Field(description="workers that admit jobs")
    depth: Natural = Field(description="blocked requests that get a worker reserved")
    without_reservations: bool = Field(description="true: the cluster is too large, and reservations are not simulated")
    empty_seconds: Amount | None = Field(description="seconds until no job waits; null: some never start")
    starts: Natural = Field(description="jobs that start")
    never: Natural = Field(description="jobs that never start: no worker takes them, or a run time is unknown")
    wait_seconds: Waits | None = Field(description="seconds from now to the start of the jobs; null: none starts")
    kinds: list[ForecastOfKind] = Field(description="the same by task and request, the most jobs first")
    tenants: list[ForecastOfTenant] = Field(
        description="the waits of the jobs of each tenant; empty where tenants are not in use"
    )


class ForecastChange(Closed):
    """The change of a forecast."""

    add: list[str] = Field(description="workers that are added")
    remove: list[str] = Field(description="workers that take no more jobs")
    depth: Natural | None = Field(description="the depth of backfill; null: as it is")


class Whatif(Closed):
    """The emptying of the backlog, as things are and with a change."""

    at: Time = Field(description="the time of the copy, ISO 8601 in UTC")
    source: Store = Field(description="the store that decides")
    running: Natural = Field(description="jobs that run")
    waiting: Natural = Field(description="jobs that wait, without paused ones")
    simulated: Natural = Field(description="waiting jobs that were simulated, the first in order")
    guessed: Natural = Field(description="running and simulated jobs whose run time is unknown")
    guess_seconds: Amount | None = Field(description="the run time that they are taken to have; null: none is known")
    change: ForecastChange = Field(description="the change")
    as_it_is: Forecast = Field(description="the outcome as things are")
    changed: Forecast | None = Field(description="the outcome with the change; null: there is none")
