"""The pool that keeps connections while they are used: `routing.database.resting_pool`."""

from __future__ import annotations

import sqlite3
import threading
from contextlib import suppress
from typing import Any

import pytest
from sqlalchemy import exc

from celery_capacity.routing.database.resting_pool import MAX_CONNECTIONS, REST_AFTER, RestingPool


@pytest.fixture
def made() -> list[Any]:
    return []


@pytest.fixture
def pool(made: list[Any]) -> RestingPool:
    def connect() -> Any:
        made.append(sqlite3.connect(":memory:", check_same_thread=False))
        return made[-1]

    return RestingPool(connect, reset_on_return=None, timeout=0.01)


def use(pool: RestingPool, at_once: int) -> None:
    for connection in [pool.connect() for _ in range(at_once)]:
        connection.close()


def test_pool_keeps_one_connection_by_default(pool: RestingPool, made: list[Any]) -> None:
    use(pool, 3)
    use(pool, 1)
    assert (len(made), pool.checkedin()) == (3, 1)


def test_pool_keeps_one_of_connections_that_come_back_at_once(pool: RestingPool) -> None:
    both = threading.Barrier(2)

    def clock() -> float:
        with suppress(threading.BrokenBarrierError):
            both.wait(0.2)
        return 100.0

    pool.clock = clock
    threads = [threading.Thread(target=pool.connect().close) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert pool.checkedin() == 1


def test_pool_of_a_busy_process_keeps_what_it_uses(pool: RestingPool, made: list[Any]) -> None:
    pool.kept = 3
    for _ in range(5):
        use(pool, 3)
    assert (len(made), pool.checkedin()) == (3, 3)
    use(pool, 5)
    assert (len(made), pool.checkedin()) == (5, 3)


def test_pool_at_rest_closes_all_connections_but_one(pool: RestingPool, made: list[Any]) -> None:
    now = 100.0
    pool.kept, pool.clock = 3, lambda: now
    use(pool, 3)
    now += REST_AFTER - 0.1
    use(pool, 1)
    assert pool.checkedin() == 3
    now += 0.1
    use(pool, 1)
    assert (len(made), pool.checkedin()) == (3, 1)
    use(pool, 3)
    assert (len(made), pool.checkedin()) == (5, 3), "the closed ones make room for others"


def test_pool_has_a_limit_whatever_came_and_went(pool: RestingPool, made: list[Any]) -> None:
    for kept in (1, 3, 2):
        pool.kept = kept
        use(pool, 7)
    connections = [pool.connect() for _ in range(MAX_CONNECTIONS)]
    with pytest.raises(exc.TimeoutError):
        pool.connect()
    for connection in connections:
        connection.close()


def test_pool_that_is_made_anew_keeps_as_many(pool: RestingPool) -> None:
    pool.kept = 3
    assert pool.recreate().kept == 3
