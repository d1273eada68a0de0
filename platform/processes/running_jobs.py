"""The running jobs that the end of `up` waits for, as Postgres knows them, read again and again in a thread."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NamedTuple

from sqlalchemy import Connection, Engine, func, select
from sqlalchemy.exc import SQLAlchemyError

from celery_capacity.routing.database import schema
from celery_capacity.routing.model.states import State

#: Seconds between two questions to Postgres.
INTERVAL = 2.0

#: Jobs that are named; the others are counted.
SHOWN = 3

#: Characters of a job's id that tell it from the others.
SHORT_ID = 8


class RunningJob(NamedTuple):
    """A running job. `seconds`: how long its present attempt has run."""

    id: str
    task: str
    worker: str
    seconds: float


class RunningJobs(threading.Thread):
    """Reader of the running jobs of some workers. `latest` is None until Postgres has answered."""

    def __init__(self, engine: Engine, workers: Sequence[str]) -> None:
        super().__init__(name="running-jobs", daemon=True)
        self._engine = engine
        self._workers = list(workers)
        self._over = threading.Event()
        self.latest: list[RunningJob] | None = None

    def run(self) -> None:
        try:
            while not self._over.is_set():
                self._look()
                self._over.wait(INTERVAL)
        finally:
            self._engine.dispose()

    def _look(self) -> None:
        try:
            with self._engine.connect() as connection:
                self.latest = read(connection, self._workers)
        except SQLAlchemyError:
            # Nothing is known now. The end of the workers does not depend on it.
            self.latest = None

    def stop(self) -> None:
        """Have the thread end at its next look. Return at once: Postgres may not answer."""
        self._over.set()


def read(connection: Connection, workers: Sequence[str]) -> list[RunningJob]:
    """Return the running jobs of these workers, the longest first."""
    jobs = schema.jobs.c
    seconds = func.extract("epoch", func.now() - jobs.started_at)
    query = (
        select(jobs.id, jobs.name, jobs.worker, func.coalesce(seconds, 0))
        .where(jobs.state == State.RUNNING.value, jobs.worker.in_(list(workers)))
        .order_by(jobs.started_at)
    )
    return [RunningJob(row[0], row[1], row[2], max(float(row[3]), 0.0)) for row in connection.execute(query)]


def summary(jobs: Sequence[RunningJob]) -> tuple[str, str]:
    """Return how many jobs are waited for, and which: their tasks, ids, workers and times."""
    number = "1 running job" if len(jobs) == 1 else f"{len(jobs)} running jobs"
    shown = [f"{job.task} {job.id[:SHORT_ID]} on {job.worker} ({duration(job.seconds)})" for job in jobs[:SHOWN]]
    if len(jobs) > SHOWN:
        shown.append(f"{len(jobs) - SHOWN} more")
    return f"Waiting for {number}:", ", ".join(shown)


def duration(seconds: float) -> str:
    """Format seconds exactly enough to see them pass: "12 s", "3 min 5 s", "2 h 10 min"."""
    minutes, rest = divmod(int(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
