"""Time for which an observer could read the store of the heartbeats without a gap."""

from __future__ import annotations

import time
from collections.abc import Mapping


class Window:
    """Record of how long an observer could read the store of the heartbeats.

    The silence of the store is not the silence of a worker. So LOST counts only time in which a heartbeat could have
    been seen. `most_gap`: seconds between two looks above which heartbeats may have gone unseen.
    """

    def __init__(self, most_gap: float) -> None:
        self._most_gap = most_gap
        self._since = self._saw_at = time.monotonic()
        #: By silent incarnation: when it was seen last, and since when nothing newer is known (monotonic).
        self.looks: dict[str, tuple[float, float]] = {}

    def saw(self) -> None:
        """Note that the store was read just now."""
        now = time.monotonic()
        if now - self._saw_at > self._most_gap:
            self.restart()
        self._saw_at = now

    def restart(self) -> None:
        """Start the time anew, since the store could not be read."""
        self._since = time.monotonic()
        self.looks = {}

    def seconds(self) -> float:
        """Return the seconds for which the store could be read without a gap."""
        return time.monotonic() - self._since

    def silent_for(self, seconds: float, seen: Mapping[str, float], *, any_lately: bool) -> list[str]:
        """Return the silent incarnations of which this observer saw nothing new for `seconds`.

        The observer's own clock counts, even if the store's clock was set meanwhile. `seen`: when each silent
        incarnation was seen last. `any_lately`: True if another incarnation was seen lately. Without news of any
        worker, not even the observer's own heartbeat, the store takes no heartbeats, and nobody is judged.
        """
        now, before = time.monotonic(), self.looks
        news = any_lately or any(
            before[incarnation][0] != last for incarnation, last in seen.items() if incarnation in before
        )
        if not news:
            self._since, before = now, {}
        self.looks = {
            incarnation: before[incarnation] if before.get(incarnation, (None,))[0] == last else (last, now)
            for incarnation, last in seen.items()
        }
        if not news:
            return []
        return [incarnation for incarnation, (_, since) in self.looks.items() if now - since >= seconds]
