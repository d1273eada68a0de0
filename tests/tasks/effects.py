"""Tasks that leave their effect in Postgres, must not start twice, or end their worker."""

from __future__ import annotations

import os
import signal
from typing import Any

import psutil
from celery import shared_task
from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session

from celery_capacity import fenced
from tests.fixtures.tasks import _client

#: A table with a row for each time that an effect came about. It does not forbid two rows of one job.
TABLE = "CREATE TABLE IF NOT EXISTS effects (job text NOT NULL, attempt int NOT NULL)"


def _leave(session: Session, task: Any) -> None:
    values = {"job": task.request.id, "attempt": task.request.attempt}
    session.execute(text("INSERT INTO effects VALUES (:job, :attempt)"), values)


def _wait(task: Any, gate: str) -> None:
    with _client() as client:
        client.rpush(f"{gate}:started", f"{task.request.id} {os.getpid()}")
        if client.blpop([f"{gate}:open"], 60) is None:
            raise TimeoutError(f"nobody opened {gate}")


@shared_task(bind=True)
def leave(self: Any, how: str = "", gate: str = "", url: str = "") -> str:
    """Leave an effect.

    `how`: `raises` in the block, `raises after` it, `held in` the block (at the gate), `held after` it, `dies after`
    it, or `twice`.
    """
    engine = create_engine(url or os.environ["DATABASE_URL"])
    try:
        with Session(engine) as session, fenced(session):
            _leave(session, self)
            if how == "raises":
                raise ValueError("in the block")
            if how == "held in":
                _wait(self, gate)
        if how == "raises after":
            raise ValueError("after the block")
        if how == "held after":
            _wait(self, gate)
        if how == "dies after":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "twice":
            with Session(engine) as session, fenced(session):
                _leave(session, self)
        return f"attempt {self.request.attempt}"
    finally:
        engine.dispose()


@shared_task(bind=True, rerun=False)
def once(self: Any, gate: str) -> None:
    """Wait at the gate; the task must not start twice."""
    _wait(self, gate)


@shared_task(bind=True)
def deadly(self: Any, trace: str) -> None:
    """End the whole worker, with all jobs that run there."""
    with open(trace, "a", encoding="utf-8") as file:
        file.write(f"{self.request.attempt} {os.getpid()}\n")
    worker = psutil.Process(os.getpid()).parent()
    assert worker is not None
    for child in worker.children():
        if child.pid != os.getpid():
            child.kill()
    worker.kill()
    os.kill(os.getpid(), signal.SIGKILL)
