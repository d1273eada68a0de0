"""The worker's own queue, where Celery's broker is not the ledger's Redis: a thread takes the messages from there.

The ledger's scripts push a job's message in the same step that admits it, always on their own server. So nothing is
published after an admission, and no publish has an unknown outcome, whatever the broker is. Where broker and ledger are
one Redis, Celery's own loop reads the queue. Where they are not, this thread reads it. The broker then serves ticks,
remote control, events and the default queue of old producers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Final

import redis
from redis.exceptions import RedisError

from celery_capacity.routing import os_threads
from celery_capacity.routing.config import timeouts
from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.lasting_warning import LastingWarning
from celery_capacity.routing.ledger.connection import connect
from celery_capacity.workers.process.service import Service

logger = logging.getLogger(__name__)

#: Seconds that the server waits for a message before it says that there is none.
POLL: Final = 1
#: Messages taken at once after the first.
BATCH: Final = 100
#: Seconds between tries while the ledger's server does not answer.
RETRY_AFTER: Final = 0.25


class LedgerQueue(Service):
    """Thread that takes messages from the worker's own queue.

    `received` is called with the bytes of each message, in this thread, and must not raise.
    """

    def __init__(self, settings: Settings, queue: str, received: Callable[[bytes], None]) -> None:
        super().__init__("ledger-queue")
        self._queue = queue
        self._received = received
        self._ending = os_threads.Event()
        self._client: redis.Redis = connect(
            str(settings.redis_url),
            settings.store_timeout,
            socket_timeout=POLL + timeouts.CONNECT * settings.store_timeout,
        )

    def _notify(self) -> None:
        # The drain hands back the jobs whose messages are left in the queue. It names the jobs, and no message.
        self._ending.set()

    def run(self) -> None:
        warning = LastingWarning(logger)
        while not self._ending.is_set():
            try:
                self._take()
                warning.over()
            except RedisError as error:
                # A message that was on its way is delivered again (START), like any message that a worker loses.
                warning.warn(f"ledger queue: the ledger's Redis does not answer: {error}")
                self._ending.wait(RETRY_AFTER)
            except Exception:
                # Go on after any error: a worker without its messages would hold the jobs that are admitted to it.
                logger.exception("ledger queue: begins anew")
                self._ending.wait(RETRY_AFTER)
        self._client.close()

    def _take(self) -> None:
        client: Any = self._client
        popped = client.brpop([self._queue], POLL)
        if popped is None:
            return
        self._received(popped[1])
        for message in client.rpop(self._queue, BATCH) or ():
            self._received(message)
