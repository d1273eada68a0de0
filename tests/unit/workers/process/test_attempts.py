"""Jobs and results that an attempt leaves to be delivered with its end."""

from __future__ import annotations

import pytest

from celery_capacity.routing.errors import NotAccepted
from celery_capacity.routing.model.job import NewJob
from celery_capacity.routing.model.message import Tag
from celery_capacity.routing.model.token import Token
from celery_capacity.workers.process import attempts
from celery_capacity.workers.process.attempts import Attempt


def job(number: int, size: int) -> NewJob:
    return NewJob(f"job-{number}", "task", "cpus=1000,slots=1", b"x" * size)


def test_attempt_keeps_what_it_publishes_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "MAX_KEPT", 100)
    attempt = Attempt(Tag("parent", Token(1, 1)), "life")
    attempt.keep([job(1, 40), job(2, 40)])
    with pytest.raises(NotAccepted, match="job parent publishes more than can be kept"):
        attempt.keep([job(3, 41)])
    attempt.keep([job(4, 20)])
    assert [published.id for published in attempt.outbox.publishes] == ["job-1", "job-2", "job-4"]
