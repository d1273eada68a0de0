"""Counts of messages that are set aside while Postgres does not take them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from celery_capacity.routing.model.reasons import Refusal, Tally
from celery_capacity.routing.store import quarantine
from celery_capacity.workers.results.quarantine_thread import QuarantineThread


@pytest.mark.parametrize("job", ["", "a job that Postgres does not know"])
def test_refused_message_is_counted_once_however_often_it_is_tried(monkeypatch: pytest.MonkeyPatch, job: str) -> None:
    errors: list[Exception] = [OperationalError("INSERT", None, Exception("read-only")) for _ in range(2)]
    written: list[Any] = []

    def write(_: Any, messages: Sequence[Any]) -> None:
        if errors:
            raise errors.pop()
        written.extend(messages)

    monkeypatch.setattr(quarantine, "known", lambda *_: set())
    monkeypatch.setattr(quarantine, "write", write)
    monkeypatch.setattr(QuarantineThread, "retry_after", (0.01,))
    engine: Any = SimpleNamespace(connect=nullcontext)
    thread = QuarantineThread(engine, tally := Tally(), "w")
    thread.start()
    thread.set_aside(b"no message", "celery", Refusal.FOREIGN, "there is no job", job)
    assert thread.flush(5)
    thread.stop(5)
    assert len(written) == 1
    assert tally.take() == {Refusal.FOREIGN: 1}
