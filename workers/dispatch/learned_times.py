"""Learned run times of tasks, as this process last read them from Postgres."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from celery_capacity.routing.policy.learned_times import Kind
from celery_capacity.routing.store import run_times


class LearnedTimes:
    """Cache of learned times. A submission pays for a look into a mapping; one of them reads the table now and then.

    `every`: seconds between two readings.
    """

    def __init__(self, find_engine: Callable[[], Engine], every: float) -> None:
        self._find_engine = find_engine
        self._every = every
        self._cached: Mapping[Kind, int] = {}
        self._until = 0.0

    def of(self, task: object, request: str) -> int:
        """Return the milliseconds that jobs of a task with this request usually run, 0 where nobody knows."""
        return self._cached.get((str(task), request), 0)

    def refresh(self, may_ask: Callable[[], bool]) -> None:
        """Read the times anew, when it is time. `may_ask` returns True if this thread may wait for Postgres."""
        if time.monotonic() < self._until or not may_ask():
            return
        self._until = time.monotonic() + self._every
        try:
            with self._find_engine().connect() as connection:
                self._cached = run_times.learned(connection)
        except SQLAlchemyError:
            # The insert reports the error, and a role that may not read the table learns nothing. What was read before
            # stays in use.
            return
