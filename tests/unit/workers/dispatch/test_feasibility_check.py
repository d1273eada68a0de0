"""The check of the requests that a sender submits: once for each in a while, and never in the sender's way."""

from __future__ import annotations

import logging
import threading
from typing import Any

import pytest
import redis

from celery_capacity.routing.ledger import snapshot
from celery_capacity.routing.policy.placement import Book
from celery_capacity.workers.dispatch import feasibility_check
from celery_capacity.workers.dispatch.feasibility_check import FeasibilityCheck
from tests.fixtures.waiting import until

WIDE = "cpus=128000,slots=1,tasks.render"
SLIM = "cpus=1000,slots=1,tasks.render"
BOOK = Book("worker-07", {"cpus": 96_000, "slots": 96}, {})


class Checked(FeasibilityCheck):
    """A check that reads the books of one worker, and notes what it was asked."""

    def __init__(self, books: list[Book]) -> None:
        super().__init__(redis.Redis(port=1))
        self.books = books
        self.reads = 0
        self.threads: set[str] = set()
        self.gate = threading.Event()
        self.gate.set()

    def _registered(self) -> list[Book]:
        self.reads += 1
        self.threads.add(threading.current_thread().name)
        self.gate.wait()
        return self.books


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let jobs wait for every shape."""
    monkeypatch.setattr(snapshot, "read_many", lambda client, commands: [b"0" for _ in commands])


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.usefixtures("waiting")
def test_shape_is_checked_once_in_a_while_and_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    check = Checked([BOOK])
    for _ in range(3):
        check.note([WIDE])
        check.finish()
    assert check.reads == 1
    assert check.threads == {"feasibility"}
    assert warnings(caplog) == [
        "A job of tasks.render (128 CPUs) asks for 128 CPUs; the largest registered worker has 96 CPUs (worker-07)."
        " It waits until a worker that is large enough registers."
    ]


@pytest.mark.usefixtures("waiting")
def test_shape_is_checked_again_later_and_not_warned_of_again(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feasibility_check, "CHECK_EVERY", 0.0)
    check = Checked([BOOK])
    for _ in range(3):
        check.note([WIDE])
        check.finish()
    assert (check.reads, len(warnings(caplog))) == (3, 1)


@pytest.mark.usefixtures("waiting")
@pytest.mark.parametrize(("shape", "books"), [(SLIM, [BOOK]), (WIDE, [])])
def test_sender_is_not_warned_where_a_worker_could_hold_it_or_none_lives(
    caplog: pytest.LogCaptureFixture, shape: str, books: list[Book]
) -> None:
    check = Checked(books)
    check.note([shape])
    check.finish()
    assert (check.reads, warnings(caplog)) == (1, [])


def test_ledger_that_does_not_answer_costs_the_sender_nothing(caplog: pytest.LogCaptureFixture) -> None:
    check = Checked([BOOK])
    check.note([WIDE])
    until(lambda: check._thread is None, "the check is over")
    assert (check.reads, warnings(caplog)) == (0, [])


@pytest.mark.usefixtures("waiting")
def test_sender_does_not_wait_for_a_check(caplog: pytest.LogCaptureFixture) -> None:
    check = Checked([BOOK])
    check.gate.clear()
    check.note([WIDE])
    check.note([SLIM])
    assert warnings(caplog) == []
    check.gate.set()
    check.finish()
    assert len(warnings(caplog)) == 1


def test_requests_that_are_remembered_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feasibility_check, "MAX_SHAPES", 5)
    check: Any = Checked([BOOK])
    for number in range(20):
        check.note([f"cpus={number},slots=1"])
        check.finish()
        assert len(check._check_from) <= 5


def test_sender_is_warned_of_a_paused_job_too(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_many(client: redis.Redis, commands: list[Any]) -> list[Any]:
        return [1 if command[0] == "SISMEMBER" else None for command in commands]

    monkeypatch.setattr(snapshot, "read_many", read_many)
    check = Checked([BOOK])
    check.note([WIDE])
    check.finish()
    assert len(warnings(caplog)) == 1
