"""Bound of one pass of the archive, however long the interval of the sweeps is."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from celery_capacity.routing.store import archive, chord_counts
from celery_capacity.workers.retention import archive as duty


@pytest.mark.parametrize("interval", [10.0, 3600.0])
def test_pass_of_the_archive_leaves_other_duties_waiting_for_a_second(
    monkeypatch: pytest.MonkeyPatch, interval: float
) -> None:
    now = 100.0

    def move(_: Any, keep: float, most: int) -> int:
        nonlocal now
        now += 0.3
        return most

    monkeypatch.setattr(duty, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(archive, "archive_finished", move)
    monkeypatch.setattr(chord_counts, "forget_old", lambda *_: 0)
    monkeypatch.setattr(archive, "open_next_month", lambda _: None)
    settings = SimpleNamespace(keep_finished=60.0, keep_archived=0.0, sweep_interval=interval)
    stores: Any = SimpleNamespace(settings=settings, engine=SimpleNamespace(connect=nullcontext))
    app: Any = None  # the duty has no use for an app
    assert duty.run_once(app, stores)["archived"] == 4 * archive.CHUNK
