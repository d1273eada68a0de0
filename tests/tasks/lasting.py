"""Bodies that run for a time, or as long as a test wants them to, whatever becomes of the stores."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Final

#: Seconds after which a body gives up, so that a failed test leaves nothing behind for long.
MAX_SECONDS: Final = 180.0
#: Seconds between two looks at a gate.
LOOK_EVERY: Final = 0.02


class Gate:
    """A gate that is shut as long as its file exists: no store that a test breaks can open it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.touch()

    def __str__(self) -> str:
        return str(self._path)

    def open(self) -> None:
        self._path.unlink(missing_ok=True)


def run_on(how_long: float | str) -> None:
    """Run for so many seconds, or until the gate with this path is open."""
    if not isinstance(how_long, str):
        time.sleep(how_long)
        return
    gate, end = Path(how_long), time.monotonic() + MAX_SECONDS
    while gate.exists():
        if time.monotonic() >= end:
            raise TimeoutError(f"nobody opened {gate} in {MAX_SECONDS:g} s")
        time.sleep(LOOK_EVERY)
