"""The wait of `drain`: a worker is empty only once Postgres has had the time to hear of its last admission."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from celery_capacity.platform.actions import drain
from celery_capacity.workers.client import controls


def test_worker_is_empty_only_once_a_second_look_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ledger admitted a job just before the drain, and Postgres hears of it after the first look."""
    seen = iter([0, 1, 0, 0])
    monkeypatch.setattr(controls, "standing", lambda *_: {"a": (True, next(seen))})
    monkeypatch.setattr(drain, "LOOK", 0.0)
    stores: Any = SimpleNamespace(
        engine=SimpleNamespace(connect=lambda: nullcontext()), settings=SimpleNamespace(worker_ttl=60.0)
    )
    assert drain._wait(stores, ["a"], stop=False, timeout=None) == {"a": 0}
    assert list(seen) == []
