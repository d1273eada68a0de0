"""Settling in the main loop, and the turns that it and the ledger thread take."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from celery_capacity.routing.errors import StoreUnavailable
from celery_capacity.routing.ledger.replies import Settled, Settling
from celery_capacity.workers.settle import settle_loop
from celery_capacity.workers.settle.settle_loop import SettleLoop

#: Seconds for steps that happen at once, however busy the machine is.
WITHIN = 60.0


class Line:
    """A connection; its reply is `reply`, None while more of it is to come, or an error."""

    def __init__(self) -> None:
        self.reply: Any = Settled([], [], [])
        self.sent = 0
        self.closed = False

    def fileno(self) -> int:
        return 7

    def close(self) -> None:
        self.closed = True


class Ledger:
    """A ledger with one connection after the other."""

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self.refuses: Exception | None = None

    def open_line(self) -> Any:
        if self.refuses is not None:
            raise self.refuses
        self.lines.append(Line())
        return self.lines[-1]

    def send_settle(self, line: Line, settling: Any) -> None:
        line.sent += 1

    def receive_settled(self, line: Line, settling: Any) -> Any:
        if isinstance(line.reply, Exception):
            raise line.reply
        return line.reply


class Hub:
    """The descriptors that the main loop watches."""

    def __init__(self) -> None:
        self.readers: dict[int, Callable[[], None]] = {}

    def add_reader(self, fd: int, callback: Callable[..., None], *args: Any) -> None:
        self.readers[fd] = lambda: callback(*args)

    def remove_reader(self, fd: int) -> None:
        del self.readers[fd]


class World:
    """A main loop with a number of pending ends, beside a thread that notes that it was woken."""

    def __init__(self) -> None:
        self.pending, self.finished, self.woken, self.started = 0, 0, 0, 0
        self.ledger, self.hub, self.exclusive = Ledger(), Hub(), threading.Lock()
        self.begins = True
        steps = (lambda: self.pending > 0, self._begin, self._finish)
        self.loop = SettleLoop(self.ledger, self.exclusive, *steps, self._wake)
        self.loop.attach(self.hub, self._start, lambda: None)
        self.loop.connect()

    @property
    def line(self) -> Line:
        return self.ledger.lines[-1]

    def _begin(self) -> Any:
        return (self.pending, Settling([], [], True, [])) if self.begins else None

    def _finish(self, batch: int, settled: Settled, start: Callable[[], None] | None) -> None:
        assert self.exclusive.locked()
        if start is not None:
            start()
        self.pending -= batch
        self.finished += batch

    def _start(self) -> None:
        self.started += 1

    def _wake(self) -> None:
        self.woken += 1

    def end(self) -> bool:
        """Have a job end in the main loop; return True if the ledger thread need not settle it."""
        self.pending += 1
        return self.loop.takes()

    def reply(self) -> None:
        self.hub.readers[7]()


@pytest.fixture
def world() -> World:
    return World()


def test_end_is_sent_at_once_and_its_reply_starts_the_next_job(world: World) -> None:
    assert world.end()
    assert (world.line.sent, world.finished, world.exclusive.locked()) == (1, 0, True)
    world.reply()
    assert (world.finished, world.started, world.exclusive.locked()) == (1, 1, False)


def test_ends_that_come_meanwhile_go_together(world: World) -> None:
    for _ in range(3):
        assert world.end()
    assert world.line.sent == 1
    world.reply()
    assert (world.finished, world.line.sent) == (1, 2)
    world.reply()
    assert (world.finished, world.pending, world.line.sent) == (3, 0, 2)
    assert not world.exclusive.locked()


def test_turn_goes_on_while_more_of_the_reply_is_to_come(world: World) -> None:
    world.line.reply = None
    world.end()
    world.reply()
    assert world.exclusive.locked()
    assert world.loop.is_under_way
    world.line.reply = Settled([], [], [])
    world.reply()
    assert world.finished == 1


@pytest.mark.parametrize("needed", ["heartbeat", "thread", "connection"])
def test_thread_settles_where_the_loop_cannot(world: World, needed: str) -> None:
    if needed == "heartbeat":
        world.exclusive.acquire()
    elif needed == "thread":
        world.begins = False
    else:
        world.loop.forget(world.line)  # type: ignore[arg-type]
    before = world.woken
    taken = world.end()
    assert not taken or world.woken > before
    assert world.line.sent == 0
    assert world.exclusive.locked() == (needed == "heartbeat")


def test_lost_reply_leaves_the_end_pending_for_the_thread(world: World) -> None:
    world.end()
    line = world.line
    line.reply = StoreUnavailable("closed")
    before = world.woken
    world.reply()
    assert (world.pending, world.finished, world.exclusive.locked()) == (1, 0, False)
    assert world.woken > before
    assert line.closed
    assert not world.hub.readers


def test_error_in_an_answer_keeps_no_turn(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("nobody thought of it")

    monkeypatch.setattr(world.loop, "_finish", fail)
    world.end()
    world.reply()
    assert (world.pending, world.exclusive.locked()) == (1, False)


@pytest.mark.parametrize("step", ["send_settle", "receive_settled"])
def test_signal_that_ends_the_worker_keeps_no_turn(world: World, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """A cold stop leaves the main thread's work. The ledger thread then hands back, and reads no old reply."""

    def end(*_: Any) -> None:
        raise SystemExit(1)

    monkeypatch.setattr(world.ledger, step, end)
    if step == "receive_settled":
        world.end()
    with pytest.raises(SystemExit):
        (world.reply if step == "receive_settled" else world.end)()
    assert (world.pending, world.exclusive.locked()) == (1, False)
    monkeypatch.undo()
    assert not world.end()
    assert world.loop._line is None


def test_late_reply_on_a_former_connection_is_no_reply_to_the_next_call(world: World) -> None:
    former, late = world.line, world.hub.readers
    world.end()
    world.reply()
    reply_on_former = late[7]
    world.loop.forget(former)  # type: ignore[arg-type]
    world.loop.connect()
    world.end()
    reply_on_former()
    assert (world.finished, world.exclusive.locked(), former.closed) == (1, True, True)
    world.reply()
    assert (world.finished, world.exclusive.locked()) == (2, False)


def test_thread_takes_a_late_reply_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.end()
    assert world.loop.take_late() is None
    monkeypatch.setattr(settle_loop, "LATE", 0.0)
    flight = world.loop.take_late()
    assert flight is not None
    assert world.loop.take_late() is None
    # The main loop sees the reply too, and leaves it to the thread.
    line = world.line
    world.reply()
    assert (line.closed, world.finished, world.hub.readers) == (False, 0, {})
    world.loop.wait_for(flight)
    assert (world.finished, world.exclusive.locked()) == (1, False)
    world.loop.connect()
    assert world.end()
    assert line.closed
    assert (world.line.sent, len(world.ledger.lines)) == (1, 2)


def test_thread_takes_over_when_the_main_loop_ends(world: World) -> None:
    world.end()
    before = world.woken
    world.loop.detach()
    assert world.woken > before
    flight = world.loop.take_late()
    assert flight is not None
    world.line.reply = StoreUnavailable("no answer")
    with pytest.raises(StoreUnavailable):
        world.loop.wait_for(flight)
    assert (world.pending, world.exclusive.locked()) == (1, False)
    assert not world.end()
    world.loop.close()
    assert world.line.closed


def test_connection_that_the_server_closes_is_left(world: World) -> None:
    """A server closes connections that are idle for its `timeout`."""
    line = world.line
    world.end()
    world.reply()
    world.reply()
    assert line.closed
    assert not world.end()
    assert not world.hub.readers


def test_idle_connection_is_closed_in_the_main_loop(world: World) -> None:
    line = world.line
    world.end()
    world.loop.rest()
    world.loop.rest()
    # A call is under way: its connection stays.
    world.loop.send()
    world.reply()
    world.loop.rest()
    open_until_then = not line.closed
    world.loop.send()
    assert (open_until_then, line.closed, world.end()) == (True, True, False)


def test_sleeping_thread_is_woken_only_if_it_sleeps_for_long(world: World) -> None:
    """It takes over a call that is late, so it has to look in time. To wake it for each job would cost as much."""
    world.woken, world.loop.looks_at = 0, float("inf")
    world.end()
    assert world.woken == 1
    world.reply()
    world.end()
    assert world.woken == 1


def test_server_without_connections_left_is_not_asked_each_time(world: World) -> None:
    world.loop.forget(world.line)  # type: ignore[arg-type]
    world.ledger.refuses = StoreUnavailable("max number of clients reached")
    world.loop.connect()
    world.ledger.refuses = None
    world.loop.connect()
    assert len(world.ledger.lines) == 1
    assert not world.end()


def test_other_threads_wake_the_main_loop(world: World) -> None:
    woken = threading.Event()
    world.loop.attach(world.hub, world._start, woken.set)
    world.pending = 1
    taken: list[bool] = []
    caller = threading.Thread(target=lambda: taken.append(world.loop.takes()))
    caller.start()
    caller.join(WITHIN)
    assert (taken, woken.is_set(), world.line.sent) == ([True], True, 0)
    # The main loop is about to take its turn: the ledger thread leaves it to it.
    assert world.loop.is_under_way
    world.loop.send()
    assert world.line.sent == 1


def test_thread_does_not_wait_for_a_main_loop_that_is_held_up(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.pending = 1
    caller = threading.Thread(target=world.loop.takes)
    caller.start()
    caller.join(WITHIN)
    monkeypatch.setattr(settle_loop, "LATE", 0.0)
    assert not world.loop.is_under_way


def test_server_reached_by_tls_is_left_to_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = SimpleNamespace(count=0)

    def none(_: Any) -> None:
        asked.count += 1

    monkeypatch.setattr(Ledger, "open_line", none)
    world = World()
    world.loop.connect()
    assert asked.count == 1
    assert not world.end()
