"""The thread of a worker that hears what concerns all workers: a new epoch of the ledger, and beat's ticks.

A process that opens the ledger waits for the workers to report their holdings. So each worker has to hear of a new
epoch at once, also an idle one. A subscription costs nothing while nothing is published.
"""

from __future__ import annotations

import logging
import select
from collections.abc import Callable
from typing import Any, Final

from redis.exceptions import RedisError

from celery_capacity.routing import os_threads
from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.inspect.job_events import EPOCH_CHANNEL
from celery_capacity.routing.ledger.connection import connect
from celery_capacity.workers.broker import beat_messages
from celery_capacity.workers.process.service import LookingService

logger = logging.getLogger(__name__)

#: Name of the connection in CLIENT LIST.
NAME: Final = "celery-capacity-epoch"
#: Most seconds until the thread looks whether it is to end.
IDLE: Final = 60.0


class EpochWatch(LookingService):
    """Thread that subscribes to new epochs and ticks.

    `on_epoch` is called when a new epoch is open, or may be: also after each gap. `on_tick` is called with the name of
    each tick, where the broker is the ledger's Redis. There, ticks are published on `tick_channel`.
    """

    def __init__(
        self,
        settings: Settings,
        on_epoch: Callable[[], None],
        on_tick: Callable[[str], None] = lambda _: None,
        tick_channel: str = "",
    ) -> None:
        super().__init__("epoch")
        self._settings = settings
        self._on_epoch = on_epoch
        self._on_tick = on_tick
        self._channels = [EPOCH_CHANNEL, *([tick_channel] if tick_channel else [])]
        self._client: Any = None
        self._pubsub: Any = None

    def run(self) -> None:
        while not self._stopping:
            try:
                self._listen()
            except (RedisError, OSError) as error:
                logger.info("new epochs are looked for until Redis tells of them again: %s", error)
                self._close()
                self._on_epoch()
                self._wake.wait(self._settings.due_interval)
            except Exception:
                # After any error the looks of the election go on, which find a new epoch too.
                logger.exception("listening for new epochs failed; it begins anew")
                self._close()
                self._wake.wait(self._settings.due_interval)
        self._close()

    def _listen(self) -> None:
        if self._pubsub is None:
            self._client = connect(str(self._settings.redis_url), self._settings.store_timeout, client_name=NAME)
            self._pubsub = self._client.pubsub()
            self._pubsub.subscribe(*self._channels)
        connection = self._pubsub.connection
        socket = getattr(connection, "_sock", None)
        if socket is None or socket.fileno() < 0:
            raise ConnectionError("the connection is gone")
        poll = os_threads.poll()
        poll.register(self._wake.fileno(), select.POLLIN)
        poll.register(socket.fileno(), select.POLLIN)
        poll.poll(IDLE * 1000)
        self._wake.clear()
        while (message := self._pubsub.get_message(timeout=0)) is not None:
            kind, channel = message["type"], (message["channel"] or b"").decode()
            # Also when the subscription begins: nobody publishes an earlier epoch again.
            if channel == EPOCH_CHANNEL and kind in ("message", "subscribe"):
                self._on_epoch()
            elif kind == "message" and (name := beat_messages.read(message["data"])):
                self._on_tick(name)

    def _close(self) -> None:
        if self._pubsub is not None:
            self._pubsub.close()
            self._client.close()
        self._pubsub = self._client = None
