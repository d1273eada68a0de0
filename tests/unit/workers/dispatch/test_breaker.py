"""Jobs that a ledger missed while it was left alone: it gets them when it answers again, each once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.errors import StoreUnavailable
from celery_capacity.routing.ledger.replies import LedgerClosed, Submitted, SubmitVerdict
from celery_capacity.routing.model.reasons import Tally
from celery_capacity.workers.dispatch import breaker as breakers
from celery_capacity.workers.dispatch import circuit
from celery_capacity.workers.dispatch.breaker import Breaker, Submission
from tests.fixtures.waiting import until

#: Seconds, longer than any test takes.
ALWAYS = 1000.0


class Ledger:
    """A ledger that notes the jobs of each call, and does not answer while it is `away`, `full` or `cold`."""

    def __init__(self) -> None:
        self.calls: list[list[Any]] = []
        self.away = self.full = self.cold = False
        self.epoch = 0

    def ping(self) -> None:
        if self.away:
            raise OSError("away")

    def submit_one(self, row: tuple[Any, ...]) -> Submitted:
        self.submit_many([row])
        return Submitted(SubmitVerdict.ADMITTED)

    def submit_many(self, rows: Sequence[tuple[Any, ...]]) -> None:
        self.calls.append([row[0] for row in rows])
        if self.away or self.full:
            raise StoreUnavailable("it does not answer")
        if self.cold:
            raise LedgerClosed(None)

    @property
    def jobs(self) -> list[Any]:
        return [job for call in self.calls for job in call]


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


@pytest.fixture
def breaker(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> Iterator[Breaker]:
    monkeypatch.setattr(circuit, "LOOK_AFTER", 0.01)
    monkeypatch.setattr(circuit, "LOOK_AT_MOST", 0.01)
    monkeypatch.setattr(circuit, "SLOW", ALWAYS)
    settings = Settings.from_environ({"REDIS_URL": "redis://127.0.0.1:1/0", "DATABASE_URL": "postgresql://nobody/none"})
    made = Breaker(settings, Tally())
    monkeypatch.setattr(made, "_ledger", ledger)
    monkeypatch.setattr(made._circuit, "_ping", ledger.ping)
    made._keep_for = ALWAYS
    yield made
    made.close()


def job(number: int, size: int = 0, epoch: int = 1) -> Submission:
    return Submission(epoch, (number, "cpus=1000,slots=1"), size)


def leave_alone(breaker: Breaker, ledger: Ledger) -> None:
    """Have the breaker open by job 0."""
    ledger.away = True
    breaker.submit([job(0)])
    assert not breaker.closed
    ledger.calls.clear()


def answer(breaker: Breaker, ledger: Ledger) -> None:
    """Have the ledger answer again."""
    ledger.away = False
    until(lambda: breaker.closed and not breaker._missed, "the ledger is asked again")


def test_missed_jobs_are_brought_in_order_when_the_ledger_answers(breaker: Breaker, ledger: Ledger) -> None:
    leave_alone(breaker, ledger)
    for number in range(1, 250):
        breaker.submit([job(number, epoch=1 + number // 200)])
    assert ledger.calls == []
    answer(breaker, ledger)
    until(lambda: ledger.jobs == [*range(250)], "all are there")
    assert [len(call) for call in ledger.calls] == [100, 100, 50]


def test_job_that_is_refused_again_is_left_to_the_sweep(
    breaker: Breaker, ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    """A full Redis answers a ping, and takes no job: without this rule it would be asked for ever."""
    leave_alone(breaker, ledger)
    ledger.full = True
    ledger.away = False
    again = "the ledger answers again"
    until(lambda: caplog.text.count(again) == 2 and breaker.closed, "the job is refused, and the ledger asked again")
    breaker.close()
    assert ledger.calls == [[0]]


def test_cold_ledger_is_not_asked_again_for_the_same_jobs(breaker: Breaker, ledger: Ledger) -> None:
    ledger.cold = True
    breaker.submit([job(1)])
    assert breaker.closed
    assert not breaker._missed


def test_newest_missed_jobs_are_kept_where_there_are_many(
    breaker: Breaker, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(breakers, "MAX_MISSED", 5)
    monkeypatch.setattr(breakers, "MAX_MISSED_BYTES", 10)
    leave_alone(breaker, ledger)
    breaker.submit([job(number) for number in range(1, 10)])
    assert [missed.args[0] for _, missed in breaker._missed] == [5, 6, 7, 8, 9]
    breaker.submit([job(10, size=9), job(11, size=2)])
    assert [missed.args[0] for _, missed in breaker._missed] == [11]
    answer(breaker, ledger)
    until(lambda: ledger.jobs == [11], "it is there")


def test_job_that_the_sweep_has_brought_by_now_is_not_brought_again(breaker: Breaker, ledger: Ledger) -> None:
    leave_alone(breaker, ledger)
    breaker._keep_for = 0.0
    breaker.submit([job(1)])
    breaker._keep_for = ALWAYS
    breaker.submit([job(2)])
    answer(breaker, ledger)
    until(lambda: ledger.jobs == [0, 2], "the others are there")


def test_unexpected_error_leaves_missed_jobs_to_the_sweep(
    breaker: Breaker, ledger: Ledger, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    leave_alone(breaker, ledger)

    def fail(_: Any) -> None:
        raise RuntimeError("something that nobody thought of")

    monkeypatch.setattr(ledger, "submit_many", fail)
    answer(breaker, ledger)
    until(lambda: "are left to the sweep" in caplog.text, "it is said")
    assert breaker.closed
