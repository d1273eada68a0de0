"""The policy of a submission for a Postgres that is away: refused, kept for the attempt's end, or tried again."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Final

import pytest
from sqlalchemy.exc import OperationalError

from celery_capacity.routing.errors import NotAccepted, OutcomeUnknown
from celery_capacity.routing.model.job import NewJob
from celery_capacity.routing.model.message import Tag
from celery_capacity.routing.model.token import Token
from celery_capacity.workers.process import when_away
from celery_capacity.workers.process.attempts import Attempt
from celery_capacity.workers.process.when_away import RowWriter, WhenAway, policy_of

JOB: Final = NewJob("job", "task", "cpus=1000,slots=1", b"message")


def away(*_: Any) -> NotAccepted:
    error = NotAccepted("Postgres refused the job")
    error.__cause__ = OperationalError("INSERT", None, Exception("no connection"))
    return error


def unknown(*_: Any) -> OutcomeUnknown:
    return OutcomeUnknown("job")


class Row:
    """Row whose first tries fail. `tries`: number of tries so far."""

    def __init__(self, fails: int, error: Exception) -> None:
        self.tries = 0
        self._fails = fails
        self._error = error

    def __call__(self) -> str:
        self.tries += 1
        if self.tries <= self._fails:
            raise self._error
        return "written"


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> RowWriter:
    monkeypatch.setattr(when_away, "AGAIN_AFTER", 0.0)
    stores: Any = SimpleNamespace(settings=SimpleNamespace(store_timeout=3.0))
    return RowWriter(stores)


def attempt_of(**options: Any) -> Attempt:
    return Attempt(Tag("parent", Token(1, 1)), "life", **options)


def test_policy_follows_the_attempt() -> None:
    assert policy_of(None) is WhenAway.REFUSE
    assert policy_of(attempt_of()) is WhenAway.KEEP
    assert policy_of(attempt_of(deferred=True)) is WhenAway.KEEP
    assert policy_of(attempt_of(patient=lambda: True)) is WhenAway.WAIT


@pytest.mark.parametrize("error", [away, unknown])
def test_program_gets_the_error_at_once(rows: RowWriter, error: Callable[[], Exception]) -> None:
    row = Row(1, error())
    with pytest.raises((NotAccepted, OutcomeUnknown)):
        rows.write(row, [JOB], None)
    assert row.tries == 1


@pytest.mark.parametrize("error", [away, unknown])
def test_attempt_keeps_the_job_and_asks_no_more_for_a_while(
    rows: RowWriter, monkeypatch: pytest.MonkeyPatch, error: Callable[[], Exception]
) -> None:
    attempt, row = attempt_of(), Row(1, error())
    assert rows.may_ask(attempt)
    assert rows.write(row, [JOB], attempt) is None
    assert not rows.may_ask(attempt)
    assert rows.write(row, [JOB], attempt) is None
    assert (row.tries, attempt.outbox.publishes) == (1, [JOB, JOB])
    # A program outside of attempts asks all the same.
    assert rows.write(row, [JOB], None) == "written"
    monkeypatch.setattr(rows, "_keep_until", 0.0)
    assert rows.write(row, [JOB], attempt) == "written"


def test_deferred_attempt_keeps_the_job_unasked(rows: RowWriter) -> None:
    attempt, row = attempt_of(deferred=True), Row(0, away())
    assert not rows.may_ask(attempt)
    assert rows.write(row, [JOB], attempt) is None
    assert (row.tries, attempt.outbox.publishes) == (0, [JOB])


def test_patient_attempt_tries_until_postgres_answers(rows: RowWriter) -> None:
    attempt, row = attempt_of(deferred=True, patient=lambda: True), Row(3, away())
    assert rows.write(row, [JOB], attempt) == "written"
    assert (row.tries, attempt.outbox.publishes) == (4, [])


def test_patient_attempt_gets_the_error_once_it_may_not_wait(rows: RowWriter) -> None:
    answers = iter([True, True, False])
    row = Row(9, unknown())
    with pytest.raises(OutcomeUnknown):
        rows.write(row, [JOB], attempt_of(patient=lambda: next(answers)))
    assert row.tries == 3


@pytest.mark.parametrize("options", [{}, {"patient": lambda: True}], ids=["keeps", "waits"])
def test_refusal_reaches_every_attempt(rows: RowWriter, options: dict[str, Any]) -> None:
    attempt, row = attempt_of(**options), Row(1, NotAccepted("a value is out of range"))
    with pytest.raises(NotAccepted):
        rows.write(row, [JOB], attempt)
    assert (row.tries, attempt.outbox.publishes) == (1, [])
