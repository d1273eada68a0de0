"""The loop of all services of a worker that others hand items to."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from celery_capacity.routing import os_threads
from celery_capacity.workers.results import batch_thread
from celery_capacity.workers.results.batch_thread import BatchThread, Left
from tests.fixtures.waiting import until

#: Seconds for steps that happen at once, however busy the machine is.
WITHIN = 60.0


class Items(BatchThread[int]):
    """A service that notes the items that it did, and keeps or puts off others."""

    most = 10
    retry_after = (0.001,)

    def __init__(self) -> None:
        super().__init__("items")
        self.done: list[int] = []
        self.keeps = False
        self.puts_off: set[int] = set()
        self.errors: list[Exception] = []
        self.threads: set[int] = set()
        self.tried = threading.Semaphore(0)
        self.paused = threading.Semaphore(0)

    def _work(self, batch: Sequence[int], *, again: bool) -> Left[int]:
        self.threads.add(threading.get_ident())
        self.tried.release()
        if self.errors:
            raise self.errors.pop()
        if self.keeps:
            return Left(batch)
        put_off = [item for item in batch if item in self.puts_off]
        self.done += [item for item in batch if item not in put_off]
        return Left(put_off=put_off)

    def _pause(self, seconds: float) -> bool:
        # A stop takes this lock too, so it comes when the thread waits.
        with self._changed:
            self.paused.release()
            return super()._pause(seconds)


@pytest.fixture
def items() -> Iterator[Items]:
    items = Items()
    yield items
    items.keeps = False
    assert items.stop(WITHIN)


def test_thread_lives_only_while_it_has_items(items: Items, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_thread, "IDLE", 0.01)
    items.add([1])
    assert not items.is_alive()
    items.start()
    assert items.flush(WITHIN)
    until(lambda: not items.is_alive(), "it has ended")
    items.add([2])
    assert items.flush(WITHIN)
    assert items.done == [1, 2]


def test_no_item_is_lost_while_the_thread_ends(items: Items, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_thread, "IDLE", 0.0001)
    items.start()
    pause = threading.Event()

    def add(first: int) -> None:
        for item in range(first, first + 500):
            items.add([item])
            if item % 3 == 0:
                pause.wait(0.0003)

    callers = [threading.Thread(target=add, args=[first]) for first in (0, 1000, 2000)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(WITHIN)
    assert items.flush(WITHIN)
    assert sorted(items.done) == [first + number for first in (0, 1000, 2000) for number in range(500)]
    assert [sorted(set(part)) == part for part in (_of(items, first) for first in (0, 1000, 2000))] == [True] * 3


def _of(items: Items, first: int) -> list[int]:
    return [item for item in items.done if first <= item < first + 1000]


def test_kept_items_go_before_others_and_stay_in_order(items: Items) -> None:
    items.keeps = True
    items.start()
    items.add([1, 2])
    assert items.tried.acquire(timeout=WITHIN)
    items.add([3])
    assert not items.flush(0.01)
    assert sorted(items.unfinished()) == [1, 2, 3]
    items.keeps = False
    assert items.flush(WITHIN)
    assert items.done == [1, 2, 3]


def test_items_that_are_put_off_delay_no_others(items: Items) -> None:
    items.puts_off = {1}
    items.start()
    items.add([1, 2])
    items.add([3])
    until(lambda: items.done == [2, 3], "the others are done")
    assert items.unfinished() == [1]
    items.puts_off = set()
    assert items.flush(WITHIN)
    assert items.done == [2, 3, 1]


def test_items_that_are_put_off_are_tried_again_under_load(items: Items) -> None:
    items.puts_off = {-1}
    items.start()
    items.add([-1])
    assert items.tried.acquire(timeout=WITHIN)
    items.puts_off = set()

    def is_done() -> bool:
        items.add(range(20))
        return -1 in items.done

    until(is_done, "it was tried among the others")


def test_add_wakes_no_thread_that_collects_a_batch(items: Items, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that wakes for each item of its batch takes the interpreter from the caller each time."""
    monkeypatch.setattr(Items, "collects", WITHIN)
    items.start()
    items.add([1])
    until(lambda: items._collecting, "the thread collects a batch")
    woken: list[None] = []
    with monkeypatch.context() as patched:
        patched.setattr(items._changed, "notify_all", lambda: woken.append(None))
        items.add([2])
        items.add([3])
        assert (woken, items.done) == ([], [])
    items.add(range(4, 4 + items.most))
    until(lambda: len(items.done) >= items.most, "a full batch is done at once")


def test_items_are_kept_after_an_unknown_error(items: Items) -> None:
    items.errors = [RuntimeError("nobody thought of it")]
    items.start()
    items.add([1])
    assert items.flush(WITHIN)
    assert items.done == [1]


def test_items_are_kept_where_the_system_has_no_thread(items: Items, monkeypatch: pytest.MonkeyPatch) -> None:
    items.start()
    with monkeypatch.context() as patched:

        def fail(_: Any) -> None:
            raise RuntimeError("can't start new thread")

        patched.setattr(os_threads.Thread, "start", fail)
        items.add([1])
        assert not items.is_alive()
    items.add([2])
    assert items.flush(WITHIN)
    assert items.done == [1, 2]


def test_stop_does_the_work_where_the_system_has_no_thread(items: Items, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interpreter that ends starts no thread any more."""

    def fail(_: Any) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(os_threads.Thread, "start", fail)
    items.start()
    items.add([1])
    assert not items.flush(WITHIN)
    assert items.stop(WITHIN)
    assert (items.done, items.threads) == ([1], {threading.get_ident()})


def test_stop_tries_all_that_is_pending_once_more(items: Items) -> None:
    items.retry_after = (WITHIN,)
    items.keeps = True
    items.start()
    items.add(range(3 * items.most))
    # A stop during a try that fails is followed by none.
    assert items.paused.acquire(timeout=WITHIN)
    items.keeps = False
    assert items.stop(WITHIN)
    assert items.done == list(range(3 * items.most))


def test_nothing_starts_after_the_stop(items: Items) -> None:
    items.start()
    assert items.stop(WITHIN)
    items.add([1])
    assert not items.is_alive()
    assert not items.done


def test_child_process_starts_no_thread(items: Items) -> None:
    items.start()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        items.add([1])
        os.write(write, b"alive" if items.is_alive() else b"none")
        os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    with os.fdopen(read) as answer:
        assert answer.read() == "none"
