"""Words for the estimated start of a job, and for how wrong such estimates were."""

from __future__ import annotations

from datetime import datetime
from typing import Final

from celery_capacity.routing.forecast.record import Errors
from celery_capacity.routing.forecast.starts import EstimatedStart
from celery_capacity.routing.simulation.forecast import NoEstimate

#: Seconds in a day: a start that is further away is shown with its date.
DAY: Final = 86_400

_WHY_NOT: Final = {
    NoEstimate.UNKNOWN_RUN_TIMES: "Its start is not estimated: run times of jobs before it are unknown."
    " Give them `expected`, or set PLATFORM_LEARN_RUN_TIMES.",
    NoEstimate.NEVER_FITS: "Its start is not estimated: no worker would take it even after all jobs before it.",
    NoEstimate.TOO_FAR: "Its start is not estimated: of the many jobs before it, too few would start.",
    NoEstimate.TENANTS: "Its start is not estimated: tenants share the workers, and too many of their jobs wait.",
}


def start_sentence(estimate: EstimatedStart) -> str:
    """Say when a job starts: "It starts about 12:03:10 (in 4 min); such estimates were off by ..."."""
    if estimate.at is None or estimate.seconds is None:
        return _WHY_NOT[estimate.why_not] if estimate.why_not is not None else ""
    words = f"It starts about {_clock(estimate.at, estimate.seconds)} (in {span(estimate.seconds)})"
    if estimate.extrapolated:
        words += f", at the pace of the first {estimate.simulated:,} jobs before it"
    if estimate.without_reservations:
        words += ", estimated without reservations, since the cluster is large"
    return f"{words}; {errors_phrase(estimate.errors)}." if estimate.errors else f"{words}."


def errors_phrase(errors: Errors) -> str:
    """Say how wrong estimates were: "such estimates were off by 20 s in the median, 3 min in 9 of 10"."""
    return f"such estimates were off by {span(errors.median)} in the median, {span(errors.p90)} in 9 of 10"


def span(seconds: float) -> str:
    """Return a duration of which only the size matters, in one unit: "4 min", "20 s", "0.3 s"."""
    seconds = max(0.0, seconds)
    if seconds < 10:
        return f"{seconds:.1f} s"
    for unit, size, least in (("d", 86_400, 172_800), ("h", 3600, 7200), ("min", 60, 120)):
        if seconds >= least:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _clock(at: datetime, seconds: float) -> str:
    """Return the time in the reader's zone, with its date where it is more than a day away."""
    return at.astimezone().strftime("%H:%M:%S" if seconds < DAY else "%Y-%m-%d %H:%M")
