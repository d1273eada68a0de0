"""The worker's part of a drain: when it is empty, and what it breaks off."""

from __future__ import annotations

from contextlib import nullcontext
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest

from celery_capacity.routing.store.controls import Cordon
from celery_capacity.workers.supervision import drain
from celery_capacity.workers.supervision.drain import Drain


def test_job_that_arrives_after_the_first_look_is_broken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was admitted just before the cordon, and neither the worker nor Postgres knew of it."""
    cordon = Cordon("a", "ann@desk", datetime.now(UTC), None, drains=True, stops=True)
    orders = SimpleNamespace(cordon_of=lambda *_: (cordon, 0.0), holds=lambda *_: False, note_stop=lambda *_: None)
    monkeypatch.setattr(drain, "controls", orders)
    held, signals, ends = iter([[], ["attempt"], [], []]), list[str](), list[bool]()

    def break_off(signal: str) -> bool:
        signals.append(signal)
        return True

    engine: Any = SimpleNamespace(connect=lambda: nullcontext())
    Drain(engine, "a", 0.0, lambda: next(held), break_off, ends.append).run()
    assert (signals, ends, list(held)) == (["TERM"], [False], [])
