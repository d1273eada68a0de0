"""Many workers in one process: each with the threads of a real worker, and without Celery's consumer and pool.

The platform's own code talks to the stores for each worker: registration (`Membership`), heartbeat (`HeartbeatThread`),
messages (`LedgerQueue`), claims and releases (`LedgerThread`). The jobs have no bodies: they end after `hold` seconds.
The workers of a process share their writer to Postgres (`Recorder`, `Confirmation`), because Postgres has no
connections for a thousand.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, Final

from sqlalchemy import Engine, text

from benchmarks.size.child import Child
from benchmarks.size.stock import MEMORY, TASK, incarnation_of, worker_name
from celery_capacity.routing.config import process_identity
from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.database.resting_pool import MAX_KEPT
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.ledger.replies import LedgerClosed
from celery_capacity.routing.model import envelope
from celery_capacity.routing.model.capacity import Capacity
from celery_capacity.routing.model.envelope import Envelope
from celery_capacity.routing.model.message import HEADER, Tag, parse_tag
from celery_capacity.routing.model.request import Request
from celery_capacity.routing.model.states import Outcome
from celery_capacity.routing.model.token import Token
from celery_capacity.workers.broker.ledger_queue import LedgerQueue
from celery_capacity.workers.membership.authority_check import Confirmation
from celery_capacity.workers.membership.context import WorkerContext
from celery_capacity.workers.membership.heartbeat import HeartbeatThread
from celery_capacity.workers.membership.registration import Membership
from celery_capacity.workers.process.holdings import Holding, Holdings
from celery_capacity.workers.process.identity import Identity, platform_version
from celery_capacity.workers.process.stores import make_engine
from celery_capacity.workers.results.outcome_writer import Recorder
from celery_capacity.workers.settle.postgres_ends import PostgresEnds
from celery_capacity.workers.settle.settle_thread import LedgerThread

#: Bytes of a thread's stack: a process has a thousand threads.
STACK: Final = 256 * 1024
#: Seconds that a thread may keep the interpreter while others wait for it. A waiting thread wakes once in each of them.
#: So with Python's 5 ms, hundreds that wait would use up the cores in which the servers have to answer.
SWITCH_INTERVAL: Final = 0.02
#: Request of a message that does not name its request.
ONE_CPU: Final = Request.of({"cpus": 1000})


class Arrived:
    """A message as the platform's transport hands it on: with the bytes that its digest is made of."""

    def __init__(self, raw: bytes) -> None:
        self._raw: Envelope = envelope.read(raw)

    @property
    def tag(self) -> Tag:
        tag = parse_tag(self._raw.tag)
        if tag is None:
            raise RuntimeError(f"a message came without a tag: {self._raw.tag}")
        return tag

    @property
    def headers(self) -> Mapping[str, Any]:
        headers: Mapping[str, Any] = self._raw["headers"]
        return headers

    @property
    def request(self) -> Request:
        carried = self._raw["headers"].get(HEADER)
        return Request.from_shape(str(carried["shape"])) if carried else ONE_CPU


class Clock(threading.Thread):
    """A thread that calls due actions."""

    def __init__(self) -> None:
        super().__init__(name="clock", daemon=True)
        self._due: list[tuple[float, int, Callable[[], object]]] = []
        self._numbers = itertools.count()
        self._changed = threading.Condition()

    def call_in(self, seconds: float, action: Callable[[], object]) -> None:
        with self._changed:
            heapq.heappush(self._due, (time.monotonic() + seconds, next(self._numbers), action))
            self._changed.notify()

    def run(self) -> None:
        while True:
            with self._changed:
                now = time.monotonic()
                if not self._due or self._due[0][0] > now:
                    self._changed.wait(self._due[0][0] - now if self._due else None)
                    continue
                action = heapq.heappop(self._due)[2]
            action()


class Shared:
    """The shared parts of the workers of one process.

    `cpus`: CPUs of each worker. `hold`: seconds that a job takes; None means for ever.
    """

    def __init__(self, settings: Settings, cpus: int, hold: float | None, tasks: Sequence[str]) -> None:
        self.settings = settings
        self.declared = {name: {"cpus": 1} for name in tasks}
        self.capacity = Capacity.of({"cpus": cpus * 1000, "memory": MEMORY, "slots": cpus})
        self.hold = hold
        self.engine: Engine = make_engine(str(settings.database_url))
        # As in the main process of a worker: a new connection for each heartbeat would cost Postgres a process.
        pool: Any = self.engine.pool
        pool.kept = MAX_KEPT
        self.confirmation = Confirmation(self.engine, settings.confirm_interval, lambda: None)
        self.confirmation.ask()
        self.ledger = Ledger(settings)
        self.recorder = Recorder(self.engine, self.ledger)
        self.clock = Clock()
        self.troubles: list[str] = []
        for thread in (self.confirmation, self.recorder, self.clock):
            thread.start()
        # The entries that a recorder drops belong to the epoch that is open.
        self.ledger.epoch = self.confirmation.epoch


class Worker:
    """A simulated worker. `held`: its jobs that run already, by Postgres's rows."""

    def __init__(self, shared: Shared, name: str, held: list[Holding]) -> None:
        self._shared = shared
        self.name = name
        self.identity = _identity(name)
        self.ledger = Ledger(shared.settings)
        self.holdings = Holdings(dict(shared.capacity.amounts))
        for holding in held:
            self.holdings.add(holding)
        context = WorkerContext(
            shared.settings,
            shared.engine,
            self.ledger,
            self.identity,
            shared.confirmation,
            self.holdings,
            shared.recorder,
        )
        self.membership = Membership(context)
        self.heartbeat = HeartbeatThread(
            context,
            self.membership,
            lambda: None,
            lambda: shared.capacity,
            lambda: None,
            lambda error: shared.troubles.append(str(error)),
        )
        ends = PostgresEnds(
            context,
            *(lambda: None, lambda: None, lambda _: None),
            lambda job, token, left: shared.troubles.append(f"{job} {token} came too late"),
        )
        self.ledger_thread = LedgerThread(
            context,
            ends,
            shared.recorder.add,
            self._start,
            self.heartbeat.closed,
            lambda raw, queue, reason, detail, unless: shared.troubles.append(f"{queue}: {detail}"),
        )
        self.heartbeat.on_missing = lambda: shared.troubles.append(f"{name} is not known")
        self.ledger_thread.on_missing = lambda: shared.troubles.append(f"{name} does not hold what it ended")
        self.ledger_queue = LedgerQueue(shared.settings, self.identity.queue, self._received)

    def join(self) -> None:
        """Register the worker. While the ledger is cold, the heartbeat registers it as soon as the ledger is open."""
        with suppress(LedgerClosed):
            self.membership.register(self._shared.capacity, self._shared.declared, lambda: None)

    def run(self) -> None:
        for thread in (self.heartbeat, self.ledger_thread, self.ledger_queue):
            thread.start()

    def _received(self, raw: bytes) -> None:
        message = Arrived(raw)
        self.ledger_thread.arrive(message.tag, message.request, message)

    def _start(self, message: Any) -> None:
        tag = message.tag if isinstance(message, Arrived) else Arrived(message.encode()).tag
        if self._shared.hold is not None:
            self._shared.clock.call_in(
                self._shared.hold, lambda: self.ledger_thread.end(tag.job, tag.token, Outcome.SUCCEEDED)
            )


def _identity(name: str) -> Identity:
    life, host, since = incarnation_of(name), f"{name}.example.org", "2026-01-01T00:00:00.000+00:00"
    return Identity(name, life, host, os.getpid(), process_identity.pid_space(), None, platform_version(), since)


_HELD: Final = text("""
SELECT id, epoch, attempt, shape, (extract(epoch FROM admitted_at) * 1000)::bigint,
  (extract(epoch FROM started_at) * 1000)::bigint
FROM jobs WHERE state = 'running' AND worker = :worker
""")


def _held(engine: Engine, worker: str) -> list[Holding]:
    with engine.connect() as connection:
        rows = connection.execute(_HELD, {"worker": worker})
        return [Holding(row[0], Token(row[1], row[2]), Request.from_shape(row[3]), "", row[4], row[5]) for row in rows]


def serve(
    pipe: Connection,
    environment: dict[str, str],
    first: int,
    count: int,
    cpus: int,
    hold: float | None,
    tasks: Sequence[str],
) -> None:
    """Run the process: send "ready" when all are registered or wait for the ledger; answer "troubles"."""
    threading.stack_size(STACK)
    sys.setswitchinterval(SWITCH_INTERVAL)
    # Each of a thousand workers would log that it has registered again.
    logging.getLogger("celery_capacity.workers").setLevel(logging.ERROR)
    shared = Shared(Settings.from_environ(environment), cpus, hold, tasks)
    names = [worker_name(number) for number in range(first, first + count)]
    workers = [Worker(shared, name, _held(shared.engine, name)) for name in names]
    for worker in workers:
        worker.join()
    for worker in workers:
        worker.run()
    pipe.send("ready")
    while True:
        word = pipe.recv()
        pipe.send({"troubles": shared.troubles}[word])


class Crowd:
    """So many workers, with so many CPUs each, in so many processes, all ready when the constructor returns.

    `tasks`: names of those that each worker says it has registered.
    """

    def __init__(
        self,
        environment: dict[str, str],
        workers: int,
        processes: int,
        *,
        cpus: int,
        hold: float | None = None,
        tasks: Sequence[str] = (TASK,),
    ) -> None:
        each = -(-workers // processes)
        self.children = [
            Child(serve, environment, first, min(each, workers - first), cpus, hold, tasks)
            for first in range(0, workers, each)
        ]
        for child in self.children:
            child.answer()

    def troubles(self) -> list[str]:
        """Return the troubles of all workers. A healthy platform has none."""
        return [line for child in self.children for line in child.ask("troubles")]

    def end(self) -> None:
        for child in self.children:
            child.end()
