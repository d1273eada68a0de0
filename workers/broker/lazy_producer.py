"""A producer that is taken from the app's pool only when something is published by it.

Celery takes a producer, with its connection to the broker, for each task that it sends. A job goes by Postgres and the
ledger instead. The producer is needed only for other messages on the way: the event `task-sent`, the platform's ticks,
the reply queue of `rpc://`.
"""

from __future__ import annotations

from typing import Any

from celery import Celery

from celery_capacity.routing.model.job import NewJob


class SpareProducer:
    """Stand-in for kombu's producer during one call. Call `release` after it. Not thread-safe."""

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._taken: Any = None
        #: Job that was made of the message that Celery published by this producer.
        self.job: NewJob | None = None
        #: Serialiser that wrote the job's body; None for Celery's default.
        self.serializer: str | None = None
        self.connection = _SpareConnection(self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.take(), name)

    @property
    def is_taken(self) -> bool:
        """Return True if a producer has been taken from the pool."""
        return self._taken is not None

    def take(self) -> Any:
        """Return the producer, taken from the pool if it is not yet. Raises what the pool raises."""
        if self._taken is None:
            timeout = self._app.conf.broker_pool_acquire_timeout
            self._taken = self._app.producer_pool.acquire(block=True, timeout=timeout)
        return self._taken

    def release(self) -> None:
        """Give the producer back, if one was taken."""
        if self._taken is not None:
            self._taken.release()


class _SpareConnection:
    """Connection of a `SpareProducer`."""

    def __init__(self, producer: SpareProducer) -> None:
        self._producer = producer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._producer.take().connection, name)

    def _reraise_as_library_errors(self) -> _SpareConnection:
        """Return the context in which Celery sends. Only what the producer raises is an error of the broker."""
        return self

    def __enter__(self) -> None:
        return None

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        if error is not None and self._producer.is_taken:
            with self._producer.take().connection._reraise_as_library_errors():
                raise error
