"""Forecasts made during a replay, beside what happened: how good the answers of `whatif` are.

A copy of the cluster is taken after each tenth of the submissions. The forecast itself is made when the replay is over,
so that it delays no submission. It is that of `whatif` without a change, for the jobs that waited at that moment. Jobs
that came later are not in it, as in any forecast.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from celery_capacity.routing.forecast.whatif import Today
from celery_capacity.routing.simulation.forecast import Waits, forecast

#: Copies that a replay takes, each after as many submissions.
MOMENTS: Final = 10
#: Milliseconds in a second.
MS: Final = 1000


@dataclass(frozen=True)
class Prediction:
    """A forecast and its outcome, for the jobs that waited at a moment.

    `at`: seconds since the first submission. `guessed`: jobs, running and waiting ones, whose run time was unknown.
    `real`: the waits of all these jobs. `compared`: the real waits of the jobs whose start was forecast.
    """

    at: float
    guessed: int
    predicted: Waits
    real: Waits
    compared: Waits

    @property
    def jobs(self) -> int:
        """Return the number of the jobs that waited."""
        return len(self.predicted.times) + self.predicted.never

    def to_json(self) -> dict[str, Any]:
        """Return the object that `demo --json` prints."""
        return {
            "at_seconds": round(self.at, 3),
            "waiting": self.jobs,
            "guessed": self.guessed,
            "empty_seconds": {"predicted": empty_seconds(self.predicted), "real": empty_seconds(self.real)},
            "wait_mean_seconds": {"predicted": mean_seconds(self.predicted), "real": mean_seconds(self.compared)},
        }


def empty_seconds(waits: Waits) -> float | None:
    """Return the seconds until none of some jobs waits; None where one never starts."""
    return None if waits.never else waits.percentile(100) / MS


def mean_seconds(waits: Waits) -> float | None:
    """Return the mean wait of some jobs in seconds; None where none starts."""
    return round(waits.mean / MS, 3) if waits.times else None


def due(number: int, jobs: int) -> bool:
    """Return True if a copy is to be taken after so many submissions of `jobs`."""
    return number * MOMENTS // jobs > (number - 1) * MOMENTS // jobs


def compare(copies: Sequence[Today], starts: Mapping[str, float], began: float) -> tuple[Prediction, ...]:
    """Return the predictions of the copies with a waiting job, beside the starts of the jobs.

    `starts`: seconds since the epoch by job, as its task saw it. `began`: those of the first submission. Jobs of others
    on the same servers are simulated, and not compared.
    """
    predictions = [_compared(copy, starts, began) for copy in copies]
    return tuple(prediction for prediction in predictions if prediction.jobs)


def _compared(today: Today, starts: Mapping[str, float], began: float) -> Prediction:
    now = today.cluster.now
    jobs = [queued.waiting.job for queued in today.cluster.waiting if queued.waiting.job in starts]
    likely = {start.job: start.started - now for start in forecast(today.cluster, today.rules).starts}
    real = {job: max(0, round(starts[job] * MS) - now) for job in jobs}
    predicted = [likely[job] for job in jobs if job in likely]
    return Prediction(
        now / MS - began,
        today.cluster.guessed,
        Waits(tuple(sorted(predicted)), len(jobs) - len(predicted)),
        Waits(tuple(sorted(real.values()))),
        Waits(tuple(sorted(real[job] for job in jobs if job in likely))),
    )
