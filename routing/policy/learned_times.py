"""Learned run times: the rule by which the runs of ended jobs become the expected time of later ones.

The runs of a task and a request are a histogram over the classes of times, whose weights decay: half of the weight is
that of the newest `HALF_WEIGHT` jobs. A task that became slower is known as slower soon, and one odd run changes
little. The quantile assumes no distribution.

The expected time changes only when the quantile moved by more than a class. Else jobs of a time between two classes
would wait now in one queue, now in the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Final

from celery_capacity.routing.model.expected import CLASSES, CLASSES_IN_DOUBLE, class_number

#: Share of the jobs of a task that run no longer than its learned time. A shorter time moves reservations, and a longer
#: one wastes gaps.
QUANTILE: Final = 0.8
#: Lower quantile, whose distance from the other is the spread.
LOW_QUANTILE: Final = 0.2
#: Jobs after which the weight of a run is half of what it was.
HALF_WEIGHT: Final = 50
#: Jobs from which a time counts as known, as in Tsafrir et al. 2007. The quantile of so few is the longest run.
FEWEST: Final = 2

_DECAY: Final = 0.5 ** (1 / HALF_WEIGHT)
#: The end of a class over its middle.
_ABOVE_MIDDLE: Final = 2 ** (1 / CLASSES_IN_DOUBLE / 2)
#: Task and request of a job: its name, and its shape without its run time.
Kind = tuple[str, str]


@dataclass(slots=True)
class Histogram:
    """Run times of a task and a request. `weights`: by the number of a class. `expected_ms`: 0 where it is unknown."""

    count: int = 0
    expected_ms: int = 0
    weights: dict[int, float] = field(default_factory=dict)

    def add(self, runs: Mapping[int, int]) -> None:
        """Add runs, counted by the number of their class, and change the expected time where the quantile moved."""
        number = sum(runs.values())
        kept = _DECAY**number
        # A large batch has no more weight than its runs would have one after another.
        self.weights = {
            rank: self.weights.get(rank, 0.0) * kept + (1 - kept) * runs.get(rank, 0) / number
            for rank in sorted(self.weights.keys() | runs.keys())
        }
        self.count += number
        estimate = self.quantile(QUANTILE)
        moved = abs(class_number(estimate) - class_number(self.expected_ms)) > 1
        if self.count >= FEWEST and (moved or not self.expected_ms):
            self.expected_ms = estimate

    def quantile(self, share: float) -> int:
        """Return the class in milliseconds within which so large a share of the runs ended."""
        sums = list(accumulate(self.weights.values()))
        summed = zip(self.weights, sums, strict=True)
        return next(CLASSES[rank] for rank, weight in summed if weight >= share * sums[-1])

    @property
    def mean_ms(self) -> int:
        """Return the mean of the runs. Each counts as the middle of its class."""
        total = sum(weight * CLASSES[rank] for rank, weight in self.weights.items())
        return max(1, round(total / _ABOVE_MIDDLE / sum(self.weights.values())))

    @property
    def spread_ms(self) -> int:
        """Return the milliseconds between the lower quantile and the upper one."""
        return self.quantile(QUANTILE) - self.quantile(LOW_QUANTILE)
