"""The time for which an observer has been able to read the store of the heartbeats without a gap."""

from __future__ import annotations

import time
from collections.abc import Mapping


class Window:
    """The silence of the store is not the silence of a worker, so LOST counts only time in which a heartbeat could have
    been seen. `most_gap`: seconds between two looks above which heartbeats may have gone unseen."""

    def __init__(self, most_gap: float) -> None:
        self._most_gap = most_gap
        self._since = self._saw_at = time.monotonic()
        #: Of silent incarnations: when they were seen last, and since when no more is known (monotonic).
        self.looks: dict[str, tuple[float, float]] = {}

    def saw(self) -> None:
        """The store was read just now."""
        now = time.monotonic()
        if now - self._saw_at > self._most_gap:
            self.restart()
        self._saw_at = now

    def restart(self) -> None:
        """The store could not be read."""
        self._since = time.monotonic()
        self.looks = {}

    def seconds(self) -> float:
        """Return for how long the store could be read."""
        return time.monotonic() - self._since

    def silent_for(self, seconds: float, seen: Mapping[str, float], *, any_lately: bool) -> list[str]:
        """Return those of all silent incarnations of which nothing new was seen in so many seconds of this observer,
        whatever the store's clock was set to meanwhile. `seen`: when each was seen last. `any_lately`: whether another
        one was seen lately. Where there is no news of anybody, the observer's own heartbeat included, the store takes
        none, and nobody is judged."""
        now, before = time.monotonic(), self.looks
        news = any_lately or any(before[life][0] != last for life, last in seen.items() if life in before)
        if not news:
            self._since, before = now, {}
        self.looks = {
            life: before[life] if before.get(life, (None,))[0] == last else (last, now) for life, last in seen.items()
        }
        return [life for life, (_, since) in self.looks.items() if now - since >= seconds] if news else []
