"""The news that a worker hears between two looks at the ledger."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import redis

from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.inspect.job_events import EPOCH_CHANNEL
from celery_capacity.routing.wake import Wake
from celery_capacity.workers.membership.epoch_watch import NAME, EpochWatch

#: Seconds of a wait that news or a wake-up end. A wait that nothing ends lasts a hundredth of it.
LONG = 120.0
SHORT = 0.2


class Heard:
    """A watch, what it passed on, and the wake-up of its thread."""

    def __init__(self, settings: Settings) -> None:
        self.epochs = 0
        self.wake = Wake()
        self.watch = EpochWatch(settings, self._on_epoch)

    def _on_epoch(self) -> None:
        self.epochs += 1
        self.wake.set()

    def wait(self, seconds: float, *, answers: bool = True) -> float:
        """Wait for news; return how many seconds that took."""
        since = time.monotonic()
        self.watch.wait(self.wake, seconds, answers=answers)
        return time.monotonic() - since


@pytest.fixture
def heard(settings: Settings) -> Iterator[Heard]:
    heard = Heard(settings)
    yield heard
    heard.watch.close()


def clients(client: redis.Redis) -> list[str]:
    number = str(client.connection_pool.connection_kwargs["db"])
    entries = client.client_list()
    return [entry["id"] for entry in entries if (entry["name"], entry["db"]) == (NAME, number)]


def test_watch_passes_on_a_new_epoch_at_once(heard: Heard, redis_client: redis.Redis) -> None:
    # The begin of the subscription counts as news, since an epoch may have been published before it.
    assert heard.wait(LONG) < LONG / 2
    assert heard.epochs == 1
    redis_client.publish(EPOCH_CHANNEL, "2")
    assert heard.wait(LONG) < LONG / 2
    assert heard.epochs == 2


def test_watch_returns_when_nothing_is_heard(heard: Heard) -> None:
    heard.wait(LONG)
    assert heard.wait(SHORT) >= SHORT
    assert heard.epochs == 1


def test_watch_begins_no_subscription_while_the_ledger_is_silent(heard: Heard) -> None:
    assert heard.wait(SHORT, answers=False) >= SHORT
    assert heard.epochs == 0
    heard.wake.set()
    assert heard.wait(LONG, answers=False) < LONG / 2


def test_watch_hears_again_after_its_connection_was_lost(heard: Heard, redis_client: redis.Redis) -> None:
    heard.wait(LONG)
    (connection,) = clients(redis_client)
    redis_client.client_kill_filter(_id=connection)
    # A lost epoch may have been published meanwhile, so the gap counts as news.
    assert heard.wait(LONG) < LONG / 2
    assert heard.epochs == 2
    heard.wait(LONG)
    redis_client.publish(EPOCH_CHANNEL, "3")
    heard.wait(LONG)
    assert heard.epochs == 4
