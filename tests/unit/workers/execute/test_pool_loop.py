"""Probes of a broker that is away, and callbacks that survive the reset of the main loop."""

from __future__ import annotations

from collections.abc import Generator
from types import SimpleNamespace
from typing import Any

import pytest

from celery_capacity.workers.broker.cut_connection import is_silence
from celery_capacity.workers.execute.pool_loop import BrokerProbe, PoolLoop


class Broker:
    """Stand-in for kombu's connection, which answers at the try with this number, at one of its addresses."""

    recoverable_connection_errors = (ConnectionError,)

    def __init__(self, answers_at: int, addresses: int = 1, error: type[Exception] = ConnectionError) -> None:
        self.alt = [f"address-{number}" for number in range(addresses)]
        self.tries = 0
        self.switched = 0
        self.released = False
        self._answers_at = answers_at
        self._error = error

    def ensure_connection(self, **options: Any) -> None:
        assert options == {"max_retries": 0, "reraise_as_library_errors": False}
        self.tries += 1
        if self.tries < self._answers_at:
            raise self._error("away")

    def maybe_switch_next(self) -> None:
        self.switched += 1

    def as_uri(self) -> str:
        return "redis://broker"

    def release(self) -> None:
        self.released = True


def probed(broker: Broker, max_retries: int | None = None) -> BrokerProbe:
    probe = BrokerProbe(broker, 0.0, max_retries, lambda: None)
    probe.run()
    return probe


def test_probe_tries_until_the_broker_answers() -> None:
    broker = Broker(answers_at=4)
    probe = probed(broker)
    assert (probe.tried, probe.done, probe.answers) == (True, True, True)
    assert (broker.tries, broker.released) == (4, True)


def test_probe_tries_each_address_before_it_pauses() -> None:
    broker = Broker(answers_at=3, addresses=3)
    assert probed(broker).answers
    assert broker.switched == 2


def test_probe_gives_up_after_the_retries_that_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("celery_capacity.workers.execute.pool_loop.PAUSES", (0.0, 0.0, 0.0))
    broker = Broker(answers_at=100)
    probe = probed(broker, 2)
    assert (probe.done, probe.answers) == (True, False)
    assert broker.tries == 3


def test_probe_leaves_an_error_that_no_try_changes_to_its_caller() -> None:
    probe = probed(Broker(answers_at=100, error=PermissionError))
    assert (probe.done, probe.answers) == (True, True)


def test_silence_is_a_time_out_and_no_refusal() -> None:
    wrapped = RuntimeError("wrapped")
    wrapped.__cause__ = TimeoutError("no answer")
    assert is_silence(wrapped)
    assert not is_silence(ConnectionRefusedError("nobody listens"))


def half() -> Generator[None, None, None]:
    yield


def test_reset_keeps_half_messages_of_the_pool_alone() -> None:
    reading, writing, gone = half(), half(), half()
    next(reading)
    hub = SimpleNamespace(
        readers={5: (reading, ()), 6: (print, ()), 7: (gone, ())}, writers={8: (writing, ()), 9: None}, on_tick=set()
    )
    added: dict[int, Any] = {}
    hub.add_reader = lambda fd, callback: added.__setitem__(fd, callback)
    hub.add_writer = lambda fd, callback: added.__setitem__(fd, callback)
    hub.reset = lambda: (hub.readers.clear(), hub.writers.clear())
    pool = SimpleNamespace(_fileno_to_outq={5: "process", 6: "process"}, _active_writers={writing})
    loop = PoolLoop(SimpleNamespace(hub=hub, pool=SimpleNamespace(_pool=pool)))
    hub.reset()
    assert not hub.readers
    # The process behind 7 has ended meanwhile.
    loop.resume()
    assert added == {5: reading, 8: writing}
    added.clear()
    loop.resume()
    assert not added


def test_reset_has_a_process_heard_again_whose_end_came_too_early() -> None:
    """Celery's pool asks a process for its descriptor, and duplicates a new one where it has none."""
    ended, alive = SimpleNamespace(_sentinel_poll=None), SimpleNamespace(_sentinel_poll=7)
    hub = SimpleNamespace(readers={}, writers={}, on_tick=set(), reset=lambda: None, add_reader=None, add_writer=None)
    PoolLoop(SimpleNamespace(hub=hub, pool=SimpleNamespace(_pool=SimpleNamespace(_pool=[ended, alive]))))
    hub.reset()
    assert not hasattr(ended, "_sentinel_poll")
    assert alive._sentinel_poll == 7
