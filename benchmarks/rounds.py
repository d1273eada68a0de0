"""Turns of both sides, and the numbers made from them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

V = TypeVar("V")


@dataclass
class Sides:
    """The values of one figure: one per round and side.

    `plain` stays empty where there is no peer.
    """

    ours: list[float] = field(default_factory=list)
    plain: list[float] = field(default_factory=list)

    @property
    def rounds(self) -> int:
        return len(self.ours)

    def medians(self) -> tuple[float, float | None]:
        """Return the median of our rounds, and of plain's rounds if there are any."""
        return statistics.median(self.ours), statistics.median(self.plain) if self.plain else None


def in_turn(rounds: int, ours: Callable[[], V], plain: Callable[[], V]) -> tuple[list[V], list[V]]:
    """Run both sides one after the other, `rounds` times: ours, plain, ours, plain."""
    ours_values: list[V] = []
    plain_values: list[V] = []
    for _ in range(rounds):
        ours_values.append(ours())
        plain_values.append(plain())
    return ours_values, plain_values


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least `share` (0 to 1) of the values do not exceed.

    Raises ValueError when there are no values.
    """
    if not values:
        raise ValueError("no values to take a percentile of")
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]
