"""Counts that wait to be told to the ledger: none is lost or doubled, whoever adds and takes them."""

from __future__ import annotations

import os
import signal
import sys
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from celery_capacity.routing.errors import BacklogFull
from celery_capacity.routing.model.reasons import Refusal, Tally

#: Threads that use a tally, and the steps that each of them takes.
THREADS = 4
STEPS = 3000


@pytest.fixture
def hasty() -> Iterator[None]:
    """Let threads take turns as often as the interpreter can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("hasty")
def test_tally_keeps_each_count_that_threads_add_and_take_at_once() -> None:
    tally = Tally()

    def work(_: int) -> Counter[str]:
        taken: Counter[str] = Counter()
        for step in range(STEPS):
            tally.add("one")
            tally.add("two", 2)
            counts = tally.take()
            if step % 2:
                taken += counts
            else:
                tally.add_all(counts)
        return taken

    with ThreadPoolExecutor(THREADS) as pool:
        total = sum(pool.map(work, range(THREADS)), Counter[str]()) + tally.take()
    assert total == {"one": THREADS * STEPS, "two": 2 * THREADS * STEPS}


def test_tally_stays_small_while_the_ledger_is_away() -> None:
    tally = Tally()
    tracemalloc.start()
    try:
        for _ in range(20_000):
            tally.add("refused.backlog")
        assert tracemalloc.get_traced_memory()[0] < 10_000
    finally:
        tracemalloc.stop()
    assert tally.take() == {"refused.backlog": 20_000}


def test_tally_is_empty_after_a_take_and_after_no_count() -> None:
    tally = Tally()
    tally.add("none", 0)
    assert not tally
    tally.add("one")
    assert tally
    assert tally.take() == {"one": 1}
    assert not tally
    assert tally.take() == {}


def test_refused_submission_counts_once_for_all_callers() -> None:
    tally, error = Tally(), BacklogFull("full")
    tally.refuse(error)
    tally.refuse(error)
    assert tally.take() == {Refusal.BACKLOG: 1}


def test_forked_child_has_no_counts_of_its_parent_and_no_held_lock() -> None:
    tally = Tally()
    tally.add("of the parent")
    with tally._lock:
        child = os.fork()
        if child == 0:
            # A lock that stays held would stop the child for ever.
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(10)
            tally.add("of the child")
            os._exit(0 if tally.take() == {"of the child": 1} else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert tally.take() == {"of the parent": 1}
