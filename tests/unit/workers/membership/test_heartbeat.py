"""The heartbeat of a worker, without a worker."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

from celery_capacity.routing.errors import StoreUnavailable
from celery_capacity.workers.membership.context import WorkerContext
from celery_capacity.workers.membership.failover import Reachability
from celery_capacity.workers.membership.heartbeat import HeartbeatThread


class Gone:
    """A ledger that refuses at once, as an absent server does."""

    settings = SimpleNamespace(renew_interval=0.01, due_interval=0.2)
    epoch = 1

    def __init__(self) -> None:
        self.asked = 0
        self.twice = threading.Event()

    def opened(self) -> Any:
        self.asked += 1
        if self.asked == 3:
            self.twice.set()
        raise StoreUnavailable("gone")


def heartbeat_of(ledger: Any, reachability: Any) -> HeartbeatThread:
    anything: Any = SimpleNamespace(draining=False, epoch=1, resting=False)
    context = WorkerContext(anything, anything, ledger, anything, anything, anything, anything, reachability)
    return HeartbeatThread(context, *[anything] * 5)


def test_a_ledger_that_is_gone_is_not_asked_without_a_pause() -> None:
    ledger = Gone()
    heartbeat = heartbeat_of(ledger, SimpleNamespace(note=lambda **_: None))
    heartbeat.start()
    assert ledger.twice.wait(10)
    heartbeat.stop(10)
    # Without pauses some ten thousand in that time.
    assert ledger.asked < 20


def test_heartbeat_goes_on_where_connections_cannot_be_cut() -> None:
    class Silent(Gone):
        def opened(self) -> Any:
            try:
                super().opened()
            except StoreUnavailable as error:
                raise error from TimeoutError()

    def fail() -> None:
        raise AttributeError("the main loop closed it meanwhile")

    ledger, reachability = Silent(), Reachability()
    reachability.on_silence = fail
    heartbeat = heartbeat_of(ledger, reachability)
    heartbeat.start()
    assert ledger.twice.wait(10)
    heartbeat.stop(10)
