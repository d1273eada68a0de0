"""A process that submits and releases while something else goes on, and records the duration of each admission."""

from __future__ import annotations

import json
import threading
import time
import uuid
from multiprocessing.connection import Connection
from typing import Final

from sqlalchemy import text

from benchmarks.books import EMPTY, message
from benchmarks.size.stock import engine_of
from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.database.authority import read_authority
from celery_capacity.routing.insert import single
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.ledger.replies import Ended, Taken
from celery_capacity.routing.model.job import NewJob
from celery_capacity.routing.model.states import Outcome
from celery_capacity.routing.model.token import Token
from celery_capacity.routing.policy.placement import order

#: A worker that always has room for these jobs, and for no others: the others ask for at least a whole CPU.
WORKER: Final = "spare"
INCARNATION: Final = "spare-life"
QUEUE: Final = "queue.spare"
CAPACITY: Final = "cpus=900,memory=1073741824,slots=8"
SHAPE: Final = "cpus=100,slots=1"
#: Seconds between two admissions.
PAUSE: Final = 0.002


class Admitting(threading.Thread):
    """The loop. `taken`: milliseconds of each admission since the last question."""

    def __init__(self, environment: dict[str, str]) -> None:
        super().__init__(daemon=True)
        self._settings = Settings.from_environ(environment)
        self._engine = engine_of(str(self._settings.database_url))
        self._ledger = Ledger(self._settings)
        self._message = message()
        self.taken: list[float] = []
        self.trouble = ""

    def register(self) -> None:
        with self._engine.connect() as connection:
            self._ledger.epoch = read_authority(connection).epoch
            people = {"cpus": 0.9, "memory": 1073741824, "slots": 8}
            connection.execute(
                text(
                    "INSERT INTO workers (incarnation, name, cpus, memory, capacity, status, hostname, pid, boot_id, "
                    "version, started_at, seen_at) VALUES (:life, :name, 900, 1073741824, CAST(:people AS jsonb), "
                    "'ready', 'host', 1, 'boot:', '0', now(), now())"
                ),
                {"life": INCARNATION, "name": WORKER, "people": json.dumps(people)},
            )
        if isinstance(self._ledger.register(WORKER, INCARNATION, QUEUE, CAPACITY, EMPTY), Taken):
            raise RuntimeError("the spare worker is there already")

    def run(self) -> None:
        try:
            while True:
                self._once()
                time.sleep(PAUSE)
        except Exception as error:
            self.trouble = f"{type(error).__name__}: {error}"

    def _once(self) -> None:
        job = str(uuid.uuid4())
        with self._engine.connect() as connection:
            inserted = single.insert_job(connection, NewJob(job, "bench.noop", SHAPE, self._message))
        begin = time.perf_counter()
        answer = self._ledger.submit(job, SHAPE, order(0, inserted.seq or 0), self._message)
        self.taken.append((time.perf_counter() - begin) * 1000)
        if answer.state != "admitted":
            raise RuntimeError(f"a job that fits became {answer.state}")
        end = Ended(job, Token(self._ledger.epoch, answer.attempt or 0), Outcome.SUCCEEDED)
        self._ledger.settle(WORKER, INCARNATION, ended=[end], most_losses=3)
        self._ledger.client.delete(QUEUE)


def serve(pipe: Connection, environment: dict[str, str]) -> None:
    """Run the process: send "ready", and answer "taken" with the admissions since the last question."""
    admitting = Admitting(environment)
    admitting.register()
    admitting.start()
    pipe.send("ready")
    while True:
        pipe.recv()
        taken, admitting.taken = admitting.taken, []
        pipe.send((taken, admitting.trouble))
