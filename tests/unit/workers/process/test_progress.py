"""Reports of progress: checked, at most one write a second, and no error of a store in the body."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from celery.exceptions import SoftTimeLimitExceeded
from sqlalchemy.exc import OperationalError

from celery_capacity.routing.database import deadlines
from celery_capacity.routing.errors import InvalidRequest
from celery_capacity.routing.model.message import Tag
from celery_capacity.routing.model.token import Token
from celery_capacity.workers.process import progress
from celery_capacity.workers.process.attempts import Attempt, held
from celery_capacity.workers.process.progress import report_meta, write_last


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the clock of the module: a list with the time."""
    now = [100.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return the writes: (current, total, message)."""
    writes: list[Any] = []

    def write(connection: Any, by: Any, value: dict[str, Any]) -> bool:
        if writes == ["fails"]:
            raise OperationalError("UPDATE", None, Exception("gone"))
        writes.append((value["current"], value["total"], value["message"]))
        return True

    class Connected:
        def __enter__(self) -> None: ...
        def __exit__(self, *_: object) -> None: ...

    class Stores:
        class engine:  # noqa: N801
            connect = Connected

    monkeypatch.setattr(progress, "stores_of", lambda _app: Stores())
    monkeypatch.setattr(progress, "write_progress", write)
    return writes


@pytest.fixture
def attempt() -> Iterator[Attempt]:
    with held(Attempt(Tag("job", Token(1, 1)), "a-life")) as running:
        yield running


def test_reports_within_a_second_are_one_write_of_the_last(
    attempt: Attempt, clock: list[float], written: list[Any]
) -> None:
    for number in range(1000):
        progress.progress(number, 1000)
    assert written == [(0, 1000, None)]
    clock[0] += 1.0
    progress.progress(1000, 1000, "all")
    assert written[1:] == [(1000, 1000, "all")]
    progress.progress(1001)
    write_last(attempt)
    write_last(attempt)
    assert written[2:] == [(1001, None, None)]


def test_failed_write_is_tried_again_later_and_never_raises(
    attempt: Attempt, clock: list[float], written: list[Any]
) -> None:
    written.append("fails")
    progress.progress(1)
    clock[0] += progress.EVERY
    written[:] = []
    progress.progress(2)
    assert written == []
    clock[0] += progress.AGAIN_AFTER
    progress.progress(3)
    assert written == [(3, None, None)]


def test_last_write_does_not_follow_a_failed_one(attempt: Attempt, clock: list[float], written: list[Any]) -> None:
    written.append("fails")
    progress.progress(1)
    written[:] = []
    write_last(attempt)
    assert written == []
    clock[0] += progress.AGAIN_AFTER
    write_last(attempt)
    assert written == [(1, None, None)]
    write_last(attempt)
    progress.progress(2)
    write_last(attempt)
    assert written[1:] == [(2, None, None)]


def test_last_write_has_little_time(attempt: Attempt, written: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[float] = []
    monkeypatch.setattr(progress, "write_progress", lambda *_: left.append(deadlines.left()))
    progress.progress(1)
    progress.progress(2)
    write_last(attempt)
    assert left[0] > 1
    assert left[1] < 0.6


def test_any_error_of_a_write_is_logged(
    attempt: Attempt, written: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> bool:
        raise ValueError("not foreseen")

    monkeypatch.setattr(progress, "write_progress", fail)
    progress.progress(1)
    assert "the progress of job job was not written: ValueError" in caplog.text


def test_time_limit_ends_a_body_that_writes_but_no_ended_one(
    attempt: Attempt, clock: list[float], written: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def over(*_: Any) -> bool:
        raise SoftTimeLimitExceeded

    monkeypatch.setattr(progress, "write_progress", over)
    with pytest.raises(SoftTimeLimitExceeded):
        progress.progress(1)
    write_last(attempt)


@pytest.mark.parametrize(
    "done",
    [
        "1",
        -1,
        float("nan"),
        float("inf"),
        None,
        True,
        pytest.param(10**400, id="large"),
        pytest.param(10**5000, id="long"),
    ],
)
def test_done_that_is_no_amount_is_refused(attempt: Attempt, written: list[Any], done: Any) -> None:
    with pytest.raises(InvalidRequest, match="progress: done"):
        progress.progress(done)
    assert written == []


def test_other_values_are_refused(attempt: Attempt, written: list[Any]) -> None:
    with pytest.raises(InvalidRequest, match="progress: total '10' is not valid"):
        progress.progress(1, "10")  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match=r"progress: total .* is not valid"):
        progress.progress(1, 10**5000)
    with pytest.raises(InvalidRequest, match="progress: message 3 is not text"):
        progress.progress(1, 10, 3)  # type: ignore[arg-type]
    assert written == []


def test_outside_of_an_attempt_nothing_is_written(written: list[Any]) -> None:
    progress.progress(1, 2)
    assert written == []


def test_metadata_of_a_state_are_a_report_if_they_have_numbers(
    attempt: Attempt, clock: list[float], written: list[Any]
) -> None:
    for meta in ({"current": "many"}, {"total": 3}, {"current": 10**5000}, None, [1], {}):
        report_meta(meta)
    assert written == []
    report_meta({"current": 3, "total": 10, "status": "half"})
    clock[0] += 1.0
    report_meta({"current": 4, "total": "ten", "message": 5})
    assert written == [(3, 10, "half"), (4, None, None)]


def test_long_message_is_cut(attempt: Attempt, written: list[Any]) -> None:
    progress.progress(1, 2, "x\0" * 1000)
    assert len(written[0][2]) <= progress.MESSAGE_LENGTH * 4
    assert "\0" not in written[0][2]
