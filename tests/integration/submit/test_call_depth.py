"""The depth of a submission: few frames of ours stand between a repeated `delay()` and its script."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any, Final

import pytest
from celery import Celery
from redis.connection import AbstractConnection
from sqlalchemy import Engine

import celery_capacity
from celery_capacity import create_app
from celery_capacity.routing.config.settings import Settings
from celery_capacity.workers.dispatch import submission_queue

#: Frames of ours from a repeated call to the command of its script, at the most.
MAX_FRAMES: Final = 9
#: Calls of one kind after which the message comes from the cache, and the connection of the ledger is made.
CALLS: Final = 5


def _ours(frame: FrameType | None) -> Iterator[str]:
    """Yield the functions of the package on a stack, the innermost first."""
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.partition(".")[0] == celery_capacity.__name__:
            yield f"{module}:{frame.f_code.co_qualname}"
        frame = frame.f_back


@pytest.fixture
def app(settings: Settings, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Celery]:
    """Yield an app without a worker, whose jobs go to the ledger one by one, in the thread of their caller."""
    for name in ("CELERY_BROKER_URL", "CELERY_RESULT_BACKEND"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(submission_queue, "IN_A_ROW", 0.0)
    monkeypatch.setattr(submission_queue, "IN_A_ROW_BUSY", 0.0)
    with create_app("shallow", resolve=lambda _: settings) as app:
        yield app
        app.platform.sending.close()
        app.platform.inserter.close()
        app.platform.engine.dispose()


def test_repeated_delay_reaches_script_in_few_frames(app: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    stacks: list[list[str]] = []
    plain: Any = AbstractConnection.send_command

    def noted(self: Any, *args: Any, **options: Any) -> None:
        if args[0] == "EVALSHA":
            stacks.append(list(_ours(sys._getframe())))
        plain(self, *args, **options)

    monkeypatch.setattr(AbstractConnection, "send_command", noted)

    @app.task(name="shallow.add")
    def add(one: int, two: int) -> int:
        return one + two

    for number in range(CALLS):
        add.delay(number, 1)
    assert len(stacks) == CALLS, "each call sends one script"
    assert len(stacks[-1]) <= MAX_FRAMES, "\n".join(stacks[-1])
    # The first call goes through Celery, so that the others do not hide a cache that is never used.
    assert len(stacks[-1]) < len(stacks[0])
