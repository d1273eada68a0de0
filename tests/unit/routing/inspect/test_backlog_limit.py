"""A backlog is counted seldom, and refuses when it is full."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy.exc import TimeoutError as PoolTimeout

from celery_capacity.routing.errors import BacklogFull
from celery_capacity.routing.inspect import backlog_limit


class Counted(backlog_limit.BacklogLimit):
    """A limit whose stores give the counts of the test."""

    def __init__(self) -> None:
        self.now = 0.0
        self.waiting = 0
        self.counts = 0
        self.takes = 0.0
        super().__init__(lambda: None, lambda: None, lambda: self.now)  # type: ignore[arg-type, return-value]

    def _count(self, limit: int) -> int:
        self.counts += 1
        self.now += self.takes
        return self.waiting


def test_without_a_limit_nobody_is_asked() -> None:
    limit = Counted()
    limit.check(0)
    assert limit.counts == 0


def test_a_count_serves_for_a_second() -> None:
    limit = Counted()
    for _ in range(50):
        limit.check(100)
    assert limit.counts == 1
    limit.now, limit.waiting = backlog_limit.COUNT_FOR, 100
    with pytest.raises(BacklogFull, match="100 jobs or more wait already"):
        limit.check(100)
    with pytest.raises(BacklogFull):
        limit.check(100)
    assert limit.counts == 2
    limit.now, limit.waiting = 2 * backlog_limit.COUNT_FOR, 99
    limit.check(100)


def test_slow_count_is_trusted_for_longer() -> None:
    limit = Counted()
    limit.takes = 1.0
    limit.check(100)
    limit.now = backlog_limit.TRUST
    limit.check(100)
    assert limit.counts == 1
    limit.now = backlog_limit.TRUST + 1.0
    limit.check(100)
    assert limit.counts == 2


def test_backlog_is_counted_anew_once_own_jobs_could_fill_it() -> None:
    limit = Counted()
    limit.waiting = 7
    for _ in range(3):
        limit.check(10)
    assert limit.counts == 1
    limit.waiting = 10
    with pytest.raises(BacklogFull):
        limit.check(10)
    assert limit.counts == 2


def test_where_neither_store_counts_the_insert_is_left_to_say_why() -> None:
    class Engine:
        def connect(self) -> Any:
            raise PoolTimeout("away too")

    backlog_limit.BacklogLimit(lambda: None, Engine).check(1)  # type: ignore[arg-type]
