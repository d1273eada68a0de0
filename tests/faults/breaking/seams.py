"""The other side of `tests.tasks.seams`: control of a worker's clock and heartbeats by a fault."""

from __future__ import annotations

from pathlib import Path

from tests.tasks.seams import LAYOUT


class Seam:
    """The seam file of a worker.

    All processes of the worker see a change at once.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._step, self._every = 0.0, 0.0
        self._write()

    def step(self, seconds: float) -> None:
        """Set the worker's clock off by so many seconds."""
        self._step = seconds
        self._write()

    def tick(self, every: float) -> None:
        """Send heartbeats in pairs every so many seconds; 0 ends the pairs."""
        self._every = every
        self._write()

    def _write(self) -> None:
        with self.path.open("r+b" if self.path.exists() else "wb") as file:
            file.write(LAYOUT.pack(self._step, self._every))
