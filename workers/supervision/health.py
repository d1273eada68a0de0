"""Signs of life of a worker for the system that runs it: two files in a folder, and messages to systemd.

- `live`: the heartbeat's thread goes on, and the main loop takes its turns. No store is asked: a Redis that is away
  must not end running jobs. A supervisor ends a worker whose `live` is old.
- `ready`: besides, the newest heartbeat reached the store that decides, and the worker may get jobs. A supervisor
  counts a worker as up, and goes on with a rollout, while its `ready` is fresh.

A file is fresh if it was modified within the last minute; each heartbeat, every ten seconds, touches both. So a check
is a `find -mmin -1`, and costs no start of Python.

The heartbeat asks the main loop to take a turn, and looks at its next time whether the loop did. A loop that is not
running has no turns to take: it waits for its broker, or the worker ends. A body in the main loop, as in a `solo` pool,
counts as a turn.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

from celery_capacity.routing.lasting_warning import LastingWarning
from celery_capacity.workers.supervision.systemd import ALIVE, READY, STOPPING, Notifier

logger = logging.getLogger(__name__)

#: The two files.
LIVE: Final = "live"
READY_FILE: Final = "ready"


class MainLoop(Protocol):
    """Main loop of a worker, which can be asked for a turn in any thread."""

    def ask_turn(self) -> None: ...

    def took_turn(self) -> bool:
        """Return True if the loop took a turn since it was asked, or has none to take."""
        ...


class Health:
    """Signs of life of one worker. The heartbeat's thread calls `beat`, so that nothing here may wait or raise."""

    def __init__(self, folder: Path | None, loop: MainLoop, notifier: Notifier | None = None) -> None:
        self._folder = folder
        self._loop = loop
        self._notifier = notifier or Notifier()
        self._warning = LastingWarning(logger)
        #: Time of the heartbeat that `ready` stands for (monotonic), and that systemd was told of.
        self._ready_at = 0.0
        self._stopping = False

    @property
    def wanted(self) -> bool:
        """Return True if anybody looks at the signs."""
        return self._folder is not None or self._notifier.wanted

    def begin(self, renew_interval: float) -> None:
        """Remove the signs of a former process, and warn of a watchdog that is faster than heartbeats."""
        self._remove(LIVE, READY_FILE)
        watchdog = self._notifier.watchdog
        if watchdog is not None and watchdog < 2 * renew_interval:
            logger.warning(
                "WatchdogSec=%g of the unit is less than twice PLATFORM_RENEW_INTERVAL=%g, between two reports:"
                " systemd will end a healthy worker; use 180",
                *(watchdog, renew_interval),
            )
        self._loop.ask_turn()

    def beat(self, reached_at: float, draining: bool) -> None:
        """Give the signs that are due after a heartbeat, whatever became of it.

        `reached_at`: time of the newest heartbeat that reached the store that decides (monotonic).
        """
        if not self.wanted:
            return
        if draining:
            self.stopping()
        if not self._loop.took_turn():
            return
        self._loop.ask_turn()
        self._touch(LIVE)
        signs = [ALIVE]
        if reached_at > self._ready_at and not self._stopping:
            if not self._ready_at:
                signs += [READY, "STATUS=registered: jobs can start here"]
            self._ready_at = reached_at
            self._touch(READY_FILE)
        self._notifier.tell(*signs)

    def stopping(self) -> None:
        """Say that the worker takes no more jobs, once."""
        if not self._stopping:
            self._stopping = True
            self._remove(READY_FILE)
            self._notifier.tell(STOPPING, "STATUS=stopping: running jobs end, nothing new starts")

    def end(self) -> None:
        """Take the signs away: the worker has ended."""
        self.stopping()
        self._remove(LIVE)

    def _touch(self, name: str) -> None:
        self._do(name, Path.touch)

    def _remove(self, *names: str) -> None:
        for name in names:
            self._do(name, lambda path: path.unlink(missing_ok=True))

    def _do(self, name: str, change: Callable[[Path], object]) -> None:
        if self._folder is None:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            change(self._folder / name)
            self._warning.over()
        except OSError as error:
            # Without the path of the file: a trouble of the folder is logged once for both.
            self._warning.warn(f"PLATFORM_HEALTH_DIR={self._folder} cannot be written: {error.strerror}")
