"""The other side of `tests.tasks.seams`: a worker's clock and heartbeats, set by whoever breaks things."""

from __future__ import annotations

from pathlib import Path

from tests.tasks.seams import LAYOUT


class Seam:
    """A worker's file. Changes are seen at once by all its processes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._step, self._every = 0.0, 0.0
        self._write()

    def step(self, seconds: float) -> None:
        """Set the worker's clock off by so many seconds."""
        self._step = seconds
        self._write()

    def tick(self, every: float) -> None:
        """Have heartbeats in pairs every so many seconds; 0 ends it."""
        self._every = every
        self._write()

    def _write(self) -> None:
        with self.path.open("r+b" if self.path.exists() else "wb") as file:
            file.write(LAYOUT.pack(self._step, self._every))
