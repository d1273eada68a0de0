"""Size of everything that is measured, relative to the sizes of the table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """A factor for sizes. `part`: 1 for the sizes of the table, less for a try."""

    part: float = 1.0

    def of(self, size: int) -> int:
        return max(1, round(size * self.part))
