"""Errbacks of an attempt, and of an eager task within its body."""

from __future__ import annotations

from typing import Any

import pytest
from celery.app.task import Context

from celery_capacity.routing.model.message import Tag
from celery_capacity.routing.model.token import Token
from celery_capacity.workers.process import attempts
from celery_capacity.workers.process.attempts import Attempt
from celery_capacity.workers.results.backends import CarriedResults


class Plain:
    """Backend that keeps the attempts that hold while it calls errbacks."""

    def __init__(self) -> None:
        self.attempts: list[Attempt | None] = []

    def _call_task_errbacks(self, request: Any, exc: Any, traceback: Any) -> None:
        self.attempts.append(attempts.current())


class Backend(CarriedResults, Plain):
    pass


@pytest.mark.parametrize(("failed", "deferred"), [("outer", True), ("eager", False)])
def test_errbacks_wait_for_the_end_of_their_own_attempt_alone(failed: str, deferred: bool) -> None:
    backend = Backend()
    with attempts.held(Attempt(Tag("outer", Token(1, 1)), "a-life")):
        backend._call_task_errbacks(Context(id=failed), ValueError(), None)
    assert [attempt and attempt.deferred for attempt in backend.attempts] == [deferred]
