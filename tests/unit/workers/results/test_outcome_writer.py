"""Outcomes that a worker has noted and Postgres does not take are not taken for written."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any
from unittest.mock import Mock

import pytest
from sqlalchemy.exc import OperationalError

from celery_capacity.routing.store import refused_transitions
from celery_capacity.workers.results import outcome_writer
from celery_capacity.workers.results.outcome_writer import Recorder
from tests.fixtures.waiting import until


class Away:
    """A Postgres that does not answer."""

    def connect(self) -> Any:
        raise OperationalError("", None, Exception("nobody is there"))


class Handed(threading.Condition):
    """A condition that hands its lock over: a waiting thread has it before the one that let it go comes back for it."""

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        threading.Event().wait(0.005)


@pytest.fixture
def writing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    monkeypatch.setattr(outcome_writer, "RETRY_AFTER", (0.001,))
    unwritten: Any = object()
    writing = Recorder(Away(), None)  # type: ignore[arg-type]
    writing._changed = Handed()
    writing.start()
    writing.add([unwritten])
    yield writing
    writing.stop(5.0)


def test_a_flush_never_says_that_all_is_written_while_it_is_not(writing: Recorder) -> None:
    """A worker that believed such an answer would give back jobs that had ended, and they would run again."""
    assert not any(writing.flush(0.01) for _ in range(20))


# Lag of Postgres behind the recorder.


class Takes:
    """A Postgres that takes outcomes when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.takes = False
        self.tried = threading.Semaphore(0)
        monkeypatch.setattr(refused_transitions, "write", self.write)
        monkeypatch.setattr(outcome_writer, "RETRY_AFTER", (0.001,))

    def write(self, _: Any, __: Any, batch: list[Any], *, wait: bool) -> tuple[list[Any], list[Any]]:
        self.tried.release()
        if not self.takes:
            raise OperationalError("", None, Exception("read-only"))
        return [], [transition for transition in batch if transition.job == "locked"]


def transitions(*jobs: str) -> list[Any]:
    return [Mock(job=job, entry="") for job in jobs]


@pytest.fixture
def postgres(monkeypatch: pytest.MonkeyPatch) -> Takes:
    return Takes(monkeypatch)


def test_recorder_is_behind_while_postgres_takes_nothing_for_too_long(postgres: Takes) -> None:
    ledger, level = Mock(), threading.Event()
    writing = Recorder(Mock(), ledger, on_level=level.set, write_within=0.05)
    writing.start()
    assert not writing.is_behind()
    writing.add(transitions("a"))
    until(writing.is_behind, "nothing was taken for so long")
    until(lambda: ledger.tally.add.called, "it is counted")
    assert not level.is_set()
    postgres.takes = True
    assert level.wait(60)
    assert not writing.is_behind()
    ledger.tally.add.assert_called_once_with("behind")
    writing.stop(5.0)


def test_recorder_is_not_behind_after_nothing_was_added(postgres: Takes) -> None:
    """A worker that registers again, and holds nothing, has nothing to say."""
    writing = Recorder(Mock(), Mock(), write_within=0.0)
    writing.add([])
    assert not writing.is_behind()


def test_recorder_names_the_jobs_of_all_that_is_unwritten(postgres: Takes) -> None:
    writing = Recorder(Mock(), Mock())
    writing.start()
    writing.add(transitions("locked", "a"))
    assert postgres.tried.acquire(timeout=60)
    assert writing.jobs() == {"locked", "a"}
    postgres.takes = True
    until(lambda: writing.jobs() == {"locked"}, "the other one is written")
    writing.stop(5.0)


def test_recorder_is_behind_while_too_much_is_unwritten(postgres: Takes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outcome_writer, "MAX_UNWRITTEN", 3)
    writing = Recorder(Mock(), Mock())
    writing.add(transitions("a", "b", "c"))
    assert not writing.is_behind()
    writing.add(transitions("d"))
    assert writing.is_behind()


def test_recorder_is_not_behind_for_one_locked_row(postgres: Takes) -> None:
    postgres.takes = True
    writing = Recorder(Mock(), Mock(), write_within=0.05)
    writing.start()
    writing.add(transitions("locked", "a"))
    for _ in range(3):
        assert postgres.tried.acquire(timeout=60)
    until(lambda: not writing._came, "the others are written")
    assert not writing.flush(0.1)
    assert not writing.is_behind()
    writing.stop(5.0)


def test_recorder_writes_outcomes_while_another_call_waits_for_a_store(postgres: Takes) -> None:
    postgres.takes = True
    writing, waits, written = Recorder(Mock(), Mock()), threading.Event(), threading.Event()
    writing._on_applied = lambda _: written.set()
    writing.start()
    writing.call(waits.wait)
    writing.add(transitions("a"))
    assert written.wait(60)
    assert not writing.flush(0.01)
    waits.set()
    assert writing.flush(10.0)
    writing.stop(5.0)
