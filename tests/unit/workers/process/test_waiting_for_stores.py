"""Failures of stores for which a worker waits at its start, and failures that end it."""

from __future__ import annotations

import pytest
from redis import exceptions as redis_errors

from celery_capacity.routing.errors import StoreUnavailable
from celery_capacity.workers.process.waiting_for_stores import may_pass


def from_redis(error: redis_errors.RedisError) -> StoreUnavailable:
    """Return the error as the ledger raises it."""
    raised = StoreUnavailable("Redis does not serve")
    raised.__cause__ = error
    return raised


@pytest.mark.parametrize(
    "error",
    [
        redis_errors.ConnectionError("refused"),
        redis_errors.BusyLoadingError("LOADING"),
        redis_errors.ReadOnlyError("READONLY"),
        # Its disk is full: redis-py has no class for it.
        redis_errors.ResponseError("MISCONF Redis is configured to save RDB snapshots, but it is unable to persist"),
    ],
)
def test_worker_waits_for_a_redis_that_cannot_serve_yet(error: redis_errors.RedisError) -> None:
    assert may_pass(from_redis(error))


@pytest.mark.parametrize(
    "error",
    [
        redis_errors.AuthenticationError("WRONGPASS"),
        redis_errors.NoPermissionError("NOPERM"),
        redis_errors.ResponseError("DB index is out of range"),
    ],
)
def test_worker_does_not_wait_for_a_redis_that_refuses_it(error: redis_errors.RedisError) -> None:
    assert not may_pass(from_redis(error))
