"""Estimated start of a waiting job, for people: the policy's forecast, and how wrong such estimates were."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from sqlalchemy import Connection

from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.forecast import record
from celery_capacity.routing.forecast.cluster import TooLarge, live_books, read_cluster
from celery_capacity.routing.forecast.record import Errors
from celery_capacity.routing.policy.placement import Book
from celery_capacity.routing.policy.reservation import Rules
from celery_capacity.routing.simulation.forecast import NoEstimate, estimate, forecast
from celery_capacity.routing.simulation.shares import Shares

#: Estimates that one pass notes. They are spread over the starts, from the soonest to the latest.
SAMPLED: Final = 5
#: Waiting jobs that a pass simulates: a tenth of a second on some workers.
SAMPLED_FROM: Final = 200
#: Workers beyond which no estimates are noted.
MAX_SAMPLED_WORKERS: Final = 500


@dataclass(frozen=True, slots=True)
class EstimatedStart:
    """Estimated start of a job. `at`: None where none is known, with the reason.

    `extrapolated`: too many jobs are before it, and the time follows from the pace of the first `simulated` ones.
    `errors`: those of estimates so far, None where no estimate has been compared.
    `without_reservations`: the cluster is too large to simulate them.
    """

    at: datetime | None
    seconds: float | None
    why_not: NoEstimate | None
    simulated: int
    extrapolated: bool
    errors: Errors | None
    without_reservations: bool = False

    def to_json(self) -> dict[str, Any]:
        return {
            "starts_at": None if self.at is None else self.at.isoformat(),
            "in_seconds": None if self.seconds is None else round(self.seconds, 3),
            "why_not": None if self.why_not is None else self.why_not.value,
            "simulated": self.simulated,
            "extrapolated": self.extrapolated,
            "errors": None if self.errors is None else self.errors.to_json(),
            "without_reservations": self.without_reservations,
        }


def rules_of(settings: Settings) -> Rules:
    """Return the rules by which workers with these settings start jobs while the ledger decides."""
    return Rules(settings.backfill_depth, round(settings.reserve_after * 1000))


def estimated_start(
    connection: Connection,
    job: str,
    position: tuple[int, int],
    books: Iterable[Book],
    rules: Rules,
    most_losses: int,
    shares: Shares | None = None,
) -> EstimatedStart | None:
    """Return when a job that waits at this position (priority, seq) starts. `shares`: of tenants that are in use.

    None where Postgres knows by now that it waits no more, or where the cluster is too large for a forecast.
    """
    priority, seq = position
    try:
        cluster = read_cluster(connection, books, most_losses, (-priority, seq), shares=shares)
    except TooLarge:
        return None
    if not cluster.beyond and not any(queued.waiting.job == job for queued in cluster.waiting):
        return None
    errors = record.errors(connection)
    estimated = estimate(cluster, rules, job)
    at = None if estimated.at is None else datetime.fromtimestamp(estimated.at / 1000, UTC)
    seconds = None if estimated.at is None else (estimated.at - cluster.now) / 1000
    return EstimatedStart(
        at,
        seconds,
        estimated.why_not,
        estimated.simulated,
        estimated.extrapolated,
        errors,
        estimated.without_reservations,
    )


def sample(
    connection: Connection, rules: Rules, most_losses: int, worker_ttl: float, shares: Shares | None = None
) -> int:
    """Estimate the starts of some waiting jobs, and note them; return how many are new."""
    if record.is_full(connection):
        return 0
    books = live_books(connection, worker_ttl)
    if not books or len(books) > MAX_SAMPLED_WORKERS:
        return 0
    try:
        cluster = read_cluster(connection, books, most_losses, most=SAMPLED_FROM, shares=shares)
    except TooLarge:
        return 0
    if not cluster.waiting:
        return 0
    # A job that starts at once is about to start anyway.
    starts = [start for start in forecast(cluster, rules).starts if start.started > cluster.now]
    step = max(1, (len(starts) - 1) // max(1, SAMPLED - 1))
    return record.note(connection, {start.job: start.started for start in starts[::step][:SAMPLED]})
