"""The watchdog of calls to Postgres, with connections that end while it looks at them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import psycopg2
import pytest

from celery_capacity.routing.database import deadlines
from celery_capacity.routing.database.deadlines import Call, Stalled
from tests.fixtures.waiting import until

#: Seconds of a call's limit.
LIMIT = 0.05
#: Seconds for a step that the watchdog does at once, however busy the machine is.
WITHIN = 60.0


class Connection:
    """A connection of the driver's, whose descriptor `look` tells."""

    made = True

    def __init__(self, look: Callable[[], int]) -> None:
        self.looked = threading.Event()
        self.ended = threading.Event()
        self._look = look

    def fileno(self) -> int:
        self.looked.set()
        return self._look()

    def close(self) -> None:
        self.ended.set()


def closed_descriptor() -> int:
    """Return the number of a file that was closed just now."""
    read, write = os.pipe()
    os.close(write)
    os.close(read)
    return read


def assert_watchdog_cuts_the_next_call(limit: float = LIMIT) -> None:
    ended = threading.Event()
    read, write = os.pipe()

    def look() -> int:
        ended.set()
        return read

    def wait_until_cut() -> None:
        with Call(Connection(look), limit):
            assert ended.wait(WITHIN), "no thread watches"
            raise psycopg2.OperationalError("the connection was cut")

    with pytest.raises(Stalled):
        wait_until_cut()
    os.close(read)
    os.close(write)


def test_watchdog_goes_on_where_a_call_ends_while_it_is_cut() -> None:
    call = Call(Connection(lambda: -1), LIMIT)
    leaving = threading.Event()

    def leave() -> None:
        leaving.wait(WITHIN)
        call.__exit__(None, None, None)

    left = threading.Thread(target=leave)

    def look() -> int:
        # The call is answered in this very moment, for example: it is out of the list, or about to be.
        leaving.set()
        left.join(LIMIT)
        return -1

    call.connection = Connection(look)
    left.start()
    call.__enter__()
    left.join(WITHIN)
    assert not left.is_alive()
    assert_watchdog_cuts_the_next_call()


def test_watchdog_goes_on_where_a_descriptor_is_closed_already() -> None:
    connection = Connection(closed_descriptor)
    with Call(connection, LIMIT):
        assert connection.looked.wait(WITHIN)
    assert_watchdog_cuts_the_next_call()


def test_watchdog_ends_without_calls_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadlines, "_IDLE", 0.01)
    assert_watchdog_cuts_the_next_call()
    for _ in range(3):
        until(lambda: not deadlines._watchdog._runs, "no thread watches")
        assert_watchdog_cuts_the_next_call()


def test_no_call_is_unwatched_while_the_watchdog_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadlines, "_IDLE", 0.0001)
    for _ in range(100):
        assert_watchdog_cuts_the_next_call(0.001)
        until(lambda: not deadlines._watchdog.calls, "no call is left")
