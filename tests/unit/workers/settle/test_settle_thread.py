"""Calls of a worker's thread to the ledger, answer by answer."""

from __future__ import annotations

import time
from queue import SimpleQueue
from typing import Any
from unittest.mock import Mock

import pytest

from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.errors import StoreUnavailable
from celery_capacity.routing.ledger.client import Ledger as Real
from celery_capacity.routing.ledger.replies import (
    Claimed,
    ClaimVerdict,
    HandedOver,
    Released,
    ReleaseVerdict,
    Settled,
    Settling,
)
from celery_capacity.routing.model.message import Tag
from celery_capacity.routing.model.request import Request
from celery_capacity.routing.model.states import Outcome, State
from celery_capacity.routing.model.token import Token
from celery_capacity.workers.membership.context import WorkerContext
from celery_capacity.workers.process.holdings import Holding, Holdings
from celery_capacity.workers.settle.answers import Batch
from celery_capacity.workers.settle.settle_loop import LATE, Flight
from celery_capacity.workers.settle.settle_thread import LedgerThread

ONE = Request.of({"cpus": 1000, "slots": 1})


class Ledger:
    """A ledger that admits `next` with the first release, and loses that answer."""

    def __init__(self) -> None:
        self.epoch, self.settings = 1, type("Settings", (), {"most_losses": 3})
        self.answers = [StoreUnavailable("lost"), None, None]

    def now_ms(self) -> int:
        return 0

    def settle(self, *_: Any, ended: Any = (), **__: Any) -> Settled:
        answer = self.answers.pop(0)
        if answer is not None:
            raise answer
        return Settled([Released(end, ReleaseVerdict.REPEAT, State.SUCCEEDED, "") for end in ended], [], [])

    def follow(self, worker: str, settled: Settled) -> None:
        assert not settled.shapes

    def hand_over_again(self, worker: str, incarnation: str, known: list[str]) -> list[HandedOver]:
        assert "next" not in known
        return [HandedOver("next", Token(1, 1), 1, 1, "", 0, ONE.shape, "message")]


class Confirmation:
    epoch, authority, may_admit = 1, "ledger", True

    def needed(self) -> None:
        """Do nothing: the authority is always confirmed here."""


@pytest.fixture
def started() -> SimpleQueue[Any]:
    return SimpleQueue()


@pytest.fixture
def confirmation() -> Confirmation:
    return Confirmation()


@pytest.fixture
def thread(started: SimpleQueue[Any], confirmation: Confirmation) -> LedgerThread:
    holdings = Holdings({"cpus": 4000, "slots": 4})
    for job in ("first", "second"):
        holdings.add(Holding(job, Token(1, 1), ONE, ""))
    nothing = Mock(is_behind=lambda: False)
    decides: Any = type("Ends", (), {"decides": False})()
    identity: Any = type("Identity", (), {"name": "w", "incarnation": "life", "pid": 7})()
    parts: Any = (Ledger(), identity, confirmation, holdings, nothing)
    context = WorkerContext(nothing, nothing, *parts)
    return LedgerThread(context, decides, nothing, started.put, nothing, nothing)


def test_jobs_of_a_lost_answer_are_asked_for_however_late_it_is(
    thread: LedgerThread, started: SimpleQueue[Any], confirmation: Confirmation
) -> None:
    thread.end("first", Token(1, 1), Outcome.SUCCEEDED)
    with pytest.raises(StoreUnavailable):
        thread._settle()
    # Postgres does not confirm any more that this worker may admit: ends alone go on.
    confirmation.may_admit = False
    assert thread._settle()
    confirmation.may_admit = True
    thread.start()
    thread.end("second", Token(1, 1), Outcome.SUCCEEDED)
    assert thread.stop(10.0)
    assert started.get(timeout=60) == "message"


def test_job_whose_claim_was_not_answered_is_named_until_it_is(
    thread: LedgerThread, started: SimpleQueue[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The claim was carried out, and its answer lost: the ledger has the job as running here."""
    claimed = Claimed("next", Token(1, 1), ClaimVerdict.CLAIMED, 1, 1, "", 0)
    answers: list[Any] = [StoreUnavailable("lost"), Settled([], [claimed], [])]
    named: list[frozenset[str]] = []

    def settle(*_: Any, **__: Any) -> Settled:
        named.append(thread._holdings.claiming)
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer  # type: ignore[no-any-return]

    monkeypatch.setattr(thread._ledger, "settle", settle)
    thread.arrive(Tag("next", Token(1, 1)), ONE, Mock(revoked=False))
    with pytest.raises(StoreUnavailable):
        thread._settle()
    assert thread._holdings.claiming == {"next"}
    thread._unsure = False
    assert thread._settle()
    assert named == [{"next"}, {"next"}]
    assert thread._holdings.claiming == set()
    assert thread._holdings.jobs() == ["first", "second", "next"]


def test_end_of_a_newer_epoch_never_goes_to_older_books(
    thread: LedgerThread, confirmation: Confirmation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ledger hangs, Postgres decides meanwhile and gives jobs, and the ledger comes back with its old books."""
    ledger: Any = thread._ledger
    decides: Any = thread._in_postgres

    def hang(*_: Any) -> list[HandedOver]:
        confirmation.epoch, confirmation.authority, decides.decides = 2, "postgres", True
        thread._holdings.add(Holding("pulled", Token(2, 1), ONE, ""))
        thread.end("pulled", Token(2, 1), Outcome.SUCCEEDED)
        return []

    released: list[str] = []

    def settle(*_: Any, ended: Any = (), **__: Any) -> Settled:
        released.extend(end.job for end in ended)
        return Settled([Released(end, ReleaseVerdict.REPEAT, State.SUCCEEDED, "") for end in ended], [], [])

    monkeypatch.setattr(ledger, "settle", settle)
    monkeypatch.setattr(ledger, "hand_over_again", hang)
    thread._unsure = True
    assert thread._settle()
    # The change may come later than the look at it as well.
    confirmation.epoch, decides.decides = 1, False
    thread.end("first", Token(1, 1), Outcome.SUCCEEDED)
    assert not thread._settle()
    assert released == []
    assert [end.ended.job for end in thread._ends] == ["pulled", "first"]


def test_lost_answer_is_asked_for_though_nothing_else_is_pending(
    thread: LedgerThread, started: SimpleQueue[Any], confirmation: Confirmation
) -> None:
    thread.end("first", Token(1, 1), Outcome.SUCCEEDED)
    with pytest.raises(StoreUnavailable):
        thread._settle()
    confirmation.may_admit = False
    assert thread._settle()
    confirmation.may_admit = True
    thread.start()
    assert started.get(timeout=60) == "message"
    assert thread.stop(10.0)


def test_handed_over_job_is_held_before_the_next_call_of_the_ledger(
    thread: LedgerThread, started: SimpleQueue[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such questions take long where Redis is slow.

    Two heartbeats that do not name a job take it back meanwhile.
    """
    ledger: Any = thread._ledger
    ledger.answers = []
    handed_over = ["next", "1.1", "1", "1", "", "0", ONE.shape, "", "", "message"]
    reply = ["ok", "7", "", "", "released", "waiting", "", ONE.shape, *handed_over]
    real = Real(Settings.from_environ({"REDIS_URL": "redis://nowhere:1", "DATABASE_URL": "postgresql://nowhere:1/x"}))
    real.epoch = 1
    monkeypatch.setattr(real, "_run_id", "life")
    monkeypatch.setattr(real, "_calls", lambda calls: [reply])
    held: list[list[str]] = []
    for question in ("place_shapes", "fill"):
        monkeypatch.setattr(real, question, lambda *_: held.append(thread._holdings.jobs()))
    thread._ledger = real
    thread.end("first", Token(1, 1), Outcome.HANDED_BACK)
    assert thread._settle()
    assert started.get(timeout=60) == "message"
    assert held == [["second", "next"]] * 2


ADMITTED = HandedOver("next", Token(1, 1), 1, 1, "", 0, ONE.shape, "message")


def in_loop(thread: LedgerThread, settled: Settled) -> bool:
    """Give an answer to the main loop; return True if that wakes the thread."""
    thread._finish_in_loop(Batch([], [], set(), False, ("w", "life"), {}), settled, None)
    return thread._wake.wait(0)


@pytest.mark.parametrize("more", [{"shapes": [ONE.shape]}, {"cursors": ["7"]}, {"cursors": [""], "freed": ["other"]}])
def test_thread_follows_up_an_answer_that_the_main_loop_took(thread: LedgerThread, more: dict[str, list[str]]) -> None:
    """A worker that was kept for a job which another one took has free room, and waiting jobs may fit there."""
    assert not in_loop(thread, Settled([], [], [], cursors=[""], freed=[""]))
    settled = Settled([], [], [], **more)
    assert in_loop(thread, settled)
    assert list(thread._follows) == [settled]


def test_thread_hears_of_a_late_job_that_the_main_loop_took(thread: LedgerThread, confirmation: Confirmation) -> None:
    """It hands such a job back where another store decides: nothing else may wake it for a minute."""
    confirmation.may_admit = False
    assert in_loop(thread, Settled([], [], [ADMITTED]))
    assert [holding.job for holding, _, _ in thread._late] == ["next"]


def test_thread_looks_in_time_at_a_call_that_was_sent_since_it_looked(
    thread: LedgerThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The main loop wakes it only where it has said that it sleeps for long."""
    slept: list[float] = []
    monkeypatch.setattr(thread._wake, "wait", slept.append)
    thread.loop.looks_at = time.monotonic() + LATE
    line: Any = None
    thread.loop._flights.append(Flight(line, Settling([], [], True, []), None, time.monotonic()))
    thread._sleep(60.0)
    thread.loop.take()
    thread._sleep(60.0)
    assert slept == [LATE, 60.0]


def test_answer_is_asked_for_again_if_a_signal_broke_it_off(
    thread: LedgerThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(*_: Any) -> None:
        raise SystemExit(1)

    thread._unsure = True
    monkeypatch.setattr(thread._holdings, "add", end)
    with pytest.raises(SystemExit):
        in_loop(thread, Settled([], [], [ADMITTED]))
    assert thread._unsure
