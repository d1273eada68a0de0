"""The heartbeat of a worker, without a worker."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from sqlalchemy.exc import OperationalError

from celery_capacity.routing.errors import StoreUnavailable
from celery_capacity.workers.membership.context import WorkerContext
from celery_capacity.workers.membership.failover import Reachability
from celery_capacity.workers.membership.heartbeat import HeartbeatThread, postgres_within
from celery_capacity.workers.membership.lifetime import Lifetime


class Gone:
    """A ledger that refuses at once, as an absent server does."""

    settings = SimpleNamespace(renew_interval=0.01, due_interval=0.2, worker_ttl=60.0, store_timeout=10.0)
    epoch = 1

    def __init__(self) -> None:
        self.asked = 0
        self.twice = threading.Event()

    def ping(self) -> None:
        """Answer: the next question is refused."""

    def opened(self) -> Any:
        self.asked += 1
        if self.asked == 3:
            self.twice.set()
        raise StoreUnavailable("gone")


class Member:
    """A membership that notes the order of its heartbeats, and whose Postgres fails with `error`."""

    draining = False
    lifetime = Lifetime()

    def __init__(self, error: Exception | None = None) -> None:
        self.order: list[str] = []
        self.told = threading.Semaphore(0)
        self.renewed = threading.Semaphore(0)
        self._error = error

    def postgres_due_in(self, _: bool) -> float:
        return 0.0

    def tell_postgres(self, *_: object) -> bool:
        self.order.append("postgres")
        self.told.release()
        if self._error is not None:
            raise self._error
        # It is told again after a due interval.
        return False

    def resize(self, *_: object) -> None:
        """Keep the capacity."""

    def renew(self, *_: object, **__: object) -> bool:
        self.order.append("ledger")
        self.renewed.release()
        return True


def heartbeat_of(ledger: Any, reachability: Any, membership: Any = None, *, resting: bool = False) -> HeartbeatThread:
    anything: Any = SimpleNamespace(draining=False, epoch=1, resting=resting, authority="", confirm_interval=5.0)
    context = WorkerContext(anything, anything, ledger, anything, anything, anything, anything, reachability)
    nothing: Any = Mock()
    member: Any = Member() if membership is None else membership
    return HeartbeatThread(context, member, nothing, nothing, nothing, nothing)


def test_cold_end_is_not_put_off_by_later_signals() -> None:
    heartbeat = heartbeat_of(Gone(), SimpleNamespace(note=lambda **_: None, lost=False))
    begun, ends = threading.Event(), []

    def end() -> None:
        ends.append(time.monotonic())
        # The signal of the cold end comes back as another stop.
        heartbeat.cold_in(0.0)
        begun.set()

    heartbeat.on_cold = end
    heartbeat.cold_in(0.2)
    heartbeat.cold_in(3600.0)
    heartbeat.start()
    assert begun.wait(60)
    heartbeat.stop(10)
    assert len(ends) == 1


def test_a_ledger_that_is_gone_is_not_asked_without_a_pause() -> None:
    ledger = Gone()
    heartbeat = heartbeat_of(ledger, SimpleNamespace(note=lambda **_: None, lost=False))
    heartbeat.start()
    assert ledger.twice.wait(60)
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
    assert ledger.twice.wait(60)
    heartbeat.stop(10)


class Here(Gone):
    """A ledger that answers."""

    def opened(self) -> Any:
        return 1, "life"


def test_postgres_hears_of_the_worker_while_the_ledger_is_gone() -> None:
    """A stopped Redis keeps a heartbeat waiting, so Postgres comes first."""

    class Stopped(Gone):
        def __init__(self) -> None:
            super().__init__()
            self.over = threading.Event()

        def opened(self) -> Any:
            self.over.wait(60)
            return super().opened()

    ledger, member = Stopped(), Member()
    ledger.settings = SimpleNamespace(**{**vars(Gone.settings), "due_interval": 0.01})
    heartbeat = heartbeat_of(ledger, Reachability(), member)
    heartbeat.start()
    assert member.told.acquire(timeout=60)
    ledger.over.set()
    for _ in range(3):
        assert member.told.acquire(timeout=60)
    assert heartbeat.stop(10)
    assert "ledger" not in member.order


def test_lease_in_the_ledger_is_renewed_while_postgres_fails() -> None:
    ledger, member = Here(), Member(OperationalError("", None, Exception("nobody is there")))
    ledger.settings = SimpleNamespace(**{**vars(Gone.settings), "renew_interval": 0.05, "due_interval": 0.01})
    heartbeat = heartbeat_of(ledger, Reachability(), member)
    heartbeat.start()
    for _ in range(3):
        assert member.renewed.acquire(timeout=60)
    assert heartbeat.stop(10)
    # A Postgres that does not answer is left alone for a renew interval, so that it delays no two renewals.
    later = member.order[member.order.index("ledger") :]
    assert later.count("postgres") <= later.count("ledger") + 1, member.order


class Settled(Member):
    """A membership of which Postgres is to hear nothing for an hour."""

    def postgres_due_in(self, _: bool) -> float:
        return 3600.0


def test_worker_at_rest_renews_its_lease_long_before_postgres_is_due() -> None:
    member = Settled()
    heartbeat = heartbeat_of(Here(), Reachability(), member, resting=True)
    heartbeat.start()
    for _ in range(3):
        assert member.renewed.acquire(timeout=60)
    assert heartbeat.stop(10)


def test_worker_at_rest_drains_at_the_end_of_its_life() -> None:
    ledger, member, over = Here(), Settled(), threading.Event()
    ledger.settings = SimpleNamespace(**{**vars(Gone.settings), "renew_interval": 3600.0, "worker_ttl": 7200.0})
    member.lifetime = Lifetime(time.monotonic() + 0.2)
    heartbeat = heartbeat_of(ledger, Reachability(), member, resting=True)
    heartbeat.on_end = over.set
    heartbeat.start()
    assert over.wait(60)
    assert heartbeat.stop(10)


@pytest.mark.parametrize(
    ("renew", "ttl", "timeout", "seconds"), [(10.0, 60.0, 10.0, 5.0), (1.0, 6.0, 10.0, 2.5), (50.0, 60.0, 60.0, 5.0)]
)
def test_postgres_takes_no_time_that_the_lease_in_the_ledger_needs(
    renew: float, ttl: float, timeout: float, seconds: float
) -> None:
    settings: Any = SimpleNamespace(renew_interval=renew, worker_ttl=ttl, store_timeout=timeout)
    assert postgres_within(settings) == seconds
    assert renew + seconds < ttl
