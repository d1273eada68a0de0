"""The subscription of a worker to the news that concern all workers: a new epoch of the ledger, and beat's ticks.

A process that opens the ledger waits for the workers to report their holdings. So each worker has to hear of a new
epoch at once, also an idle one. A subscription costs nothing while nothing is published. The thread of the election
waits for news between two looks at the ledger.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, Final

from redis.exceptions import RedisError

from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.inspect.job_events import EPOCH_CHANNEL
from celery_capacity.routing.ledger import keys
from celery_capacity.routing.ledger.connection import connect
from celery_capacity.routing.wake import Wake
from celery_capacity.workers.broker import beat_messages

logger = logging.getLogger(__name__)

#: Name of the connection in CLIENT LIST.
NAME: Final = "celery-capacity-epoch"


class EpochWatch:
    """Subscription to new epochs and ticks, used by one thread.

    `on_epoch` is called when a new epoch is open, or may be: also after each gap. `on_tick` is called with the name of
    each tick, where the broker is the ledger's Redis. There, ticks are published on `tick_channel`. `on_low` is called
    with the message where a shape in the ledger runs low of waiting jobs, or a job asks for a reservation (`RESERVE`).
    Only the runner of the duties listens to that.
    """

    def __init__(
        self,
        settings: Settings,
        on_epoch: Callable[[], None],
        on_tick: Callable[[str], None] = lambda _: None,
        tick_channel: str = "",
        on_low: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._settings = settings
        self._on_epoch = on_epoch
        self._on_tick = on_tick
        self._on_low = on_low
        #: True while the subscription is the runner's.
        self._runs = False
        self._channels = [EPOCH_CHANNEL, keys.CORDONS, *([tick_channel] if tick_channel else [])]
        #: Name of this worker, and the function that is called when an operator cordons, drains or frees it.
        self.worker = ""
        self.on_cordon: Callable[[], None] = lambda: None
        self._client: Any = None
        self._pubsub: Any = None

    def wait(self, wake: Wake, seconds: float, *, answers: bool, runs: bool = False) -> None:
        """Pass on news until somebody wakes the caller, or so many seconds are over.

        `runs`: the caller runs the duties. `answers`: the ledger answered just now. A subscription that is lost is made
        anew only then, so that a stopped Redis keeps the caller waiting no longer.
        """
        until = time.monotonic() + seconds
        try:
            if self._pubsub is None and answers:
                self._subscribe()
            if self._pubsub is not None and runs != self._runs:
                (self._pubsub.subscribe if runs else self._pubsub.unsubscribe)(keys.LOW)
                self._runs = runs
            while self._pubsub is not None and (left := until - time.monotonic()) > 0:
                if self._hear(wake, left):
                    return
        except (RedisError, OSError) as error:
            logger.info("new epochs are looked for until Redis tells of them again: %s", error)
            until = self._begin_again(until)
        except Exception:
            # After any error the looks of the election go on, which find a new epoch too.
            logger.exception("listening for new epochs failed; it begins anew")
            until = self._begin_again(until)
        wake.wait(until - time.monotonic())

    def close(self) -> None:
        if self._pubsub is not None:
            self._pubsub.close()
            self._client.close()
        self._pubsub = self._client = None
        self._runs = False

    def _begin_again(self, until: float) -> float:
        """Let go of the subscription; return the time at which it may begin anew (monotonic)."""
        self.close()
        self._on_epoch()
        return min(until, time.monotonic() + self._settings.due_interval)

    def _subscribe(self) -> None:
        self._client = connect(str(self._settings.redis_url), self._settings.store_timeout, client_name=NAME)
        self._pubsub = self._client.pubsub()
        self._pubsub.subscribe(*self._channels)

    def _hear(self, wake: Wake, seconds: float) -> bool:
        """Wait for news, and pass them on; return True if somebody woke the caller."""
        socket = getattr(self._pubsub.connection, "_sock", None)
        if socket is None or socket.fileno() < 0:
            raise ConnectionError("the connection is gone")
        woken, _ = wake.wait_beside(socket.fileno(), seconds)
        while (message := self._pubsub.get_message(timeout=0)) is not None:
            kind, channel = message["type"], (message["channel"] or b"").decode()
            # The beginning of a subscription counts too, since nobody publishes an earlier epoch again.
            if channel == EPOCH_CHANNEL and kind in ("message", "subscribe"):
                self._on_epoch()
            elif channel == keys.CORDONS:
                # When the subscription begins, an earlier cordon may have been missed.
                if kind == "subscribe" or (kind == "message" and message["data"].decode() == self.worker):
                    self.on_cordon()
            elif channel == keys.LOW:
                # Also when the subscription begins, because an earlier shape is not told again.
                self._on_low(message["data"].decode() if kind == "message" else "")
            elif kind == "message" and (name := beat_messages.read(message["data"])):
                self._on_tick(name)
        return woken
