"""Celery's Redis backend for results, without a subscription for every task that is sent.

Celery subscribes to a result's channel when the task is sent, and again (a no-op then) when somebody waits for it,
before it reads the state. The second is enough; the first costs each `delay()` two commands and, with Redis down,
makes it fail after many seconds, before the platform's sender is even asked.
"""

from __future__ import annotations

from typing import Any, Final

from celery.backends.redis import RedisBackend

#: Celery's names of backends -> where ours is, for `loader.override_backends`.
BACKENDS: Final = {
    "redis": "workers.results:PlatformRedisBackend",
    "rediss": "workers.results:PlatformRedisBackend",
}


class PlatformRedisBackend(RedisBackend):
    """Subscribes when somebody waits."""

    def on_task_call(self, producer: Any, task_id: str) -> None:
        """Nothing to prepare: `AsyncResult.get` and groups subscribe before they read."""
