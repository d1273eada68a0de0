"""A ledger with any number of registered workers, without worker processes."""

from __future__ import annotations

import base64
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.servers import Pair
from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.ledger.keys import private_queue
from celery_capacity.routing.ledger.replies import Arrived, Ended, Submitted, Taken
from celery_capacity.routing.model.states import Outcome
from celery_capacity.routing.model.token import Token
from celery_capacity.routing.policy.placement import order
from celery_capacity.routing.policy.tenants import tenant_term

#: Capacity of every worker: 64 CPUs and as many slots, 256 GiB.
CPUS = 64
CAPACITY = f"cpus={CPUS}000,memory={256 * 2**30},slots={CPUS}"

#: Fields that a registration writes into the view in addition.
EMPTY = {"status": "ready", "allocated_cpus": "0", "allocated_memory": "0", "allocated_slots": "0"}

#: Request of a measured job: one CPU, like a task that declares nothing.
REQUEST = "cpus=1000,slots=1"

#: The measured request in another queue than the default one, and the capacity of a worker that serves both.
REQUEST_OF_QUEUE = "cpus=1000,queue:rare=1,slots=1"
CAPACITY_WITH_QUEUE = f"cpus={CPUS}000,memory={256 * 2**30},queue:rare={10**9},slots={CPUS}"

#: Jobs of the backlog that are filed in one round trip.
CHUNK = 1000

#: Losses that end a job as lost, as on the platform. Nothing is lost here.
MOST_LOSSES = 3


class Books:
    """The ledger of one figure. Workers are named w0, w1, ...; each is an incarnation of its own."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.message = message()
        self._sequence = 0
        self._incarnations: dict[str, str] = {}

    def register(self, worker: str, capacity: str = CAPACITY) -> None:
        """Open the book of a worker as its process would. Raise RuntimeError if the name is taken."""
        self._incarnations[worker] = incarnation = str(uuid.uuid4())
        queue = private_queue(worker, incarnation)
        view = self.view(worker) | EMPTY
        if isinstance(self.ledger.register(worker, incarnation, queue, capacity, view), Taken):
            raise RuntimeError(f"the name {worker} is taken")

    def leave(self, worker: str) -> None:
        """Close the book of a worker that holds nothing."""
        self.ledger.leave(worker, self._incarnations.pop(worker))

    def incarnation(self, worker: str) -> str:
        """Return the incarnation of a registered worker."""
        return self._incarnations[worker]

    def renew(self, worker: str, holds: list[str]) -> None:
        """Send the heartbeat of a worker that holds these jobs. Raise RuntimeError if it is not registered."""
        incarnation = self._incarnations[worker]
        if not self.ledger.renew(worker, incarnation, self.view(worker), holds, MOST_LOSSES).known:
            raise RuntimeError(f"the ledger does not know {worker}")

    def view(self, worker: str) -> dict[str, str]:
        """Return the fields that people read in `worker:<name>`, as many and as long as a worker's heartbeat writes."""
        incarnation = self._incarnations[worker]
        return {
            "cpus": str(CPUS),
            "memory": str(256 * 2**30),
            "slots": str(CPUS),
            "hostname": f"{worker}.example.org",
            "pid": "4242",
            "incarnation": incarnation,
            "started_at": "2026-01-01T00:00:00.000+00:00",
            "heartbeat_at": "2026-01-01T00:00:00.000+00:00",
            "version": "0.1.0",
            "queue": private_queue(worker, incarnation),
        }

    def new_job(self) -> tuple[str, int]:
        """Return an unused id, and the order of a job of priority 0 that is submitted now."""
        self._sequence += 1
        return str(uuid.uuid4()), order(0, self._sequence)

    def release(self, job: str, answer: Submitted) -> None:
        """Release the allocation of an admitted job, and remove its message and entries. Its tombstone stays.

        Raises RuntimeError if the answer is not an admission.
        """
        if answer.state != "admitted":
            raise RuntimeError(f"a job that fits became {answer.state}")
        worker = str(answer.worker)
        incarnation = self._incarnations[worker]
        end = Ended(job, Token(self.ledger.epoch, answer.attempt or 0), Outcome.SUCCEEDED)
        released = self.ledger.settle(worker, incarnation, ended=[end], most_losses=MOST_LOSSES).released
        self.ledger.ack_transitions([(release.entry, job) for release in released])
        self.ledger.client.delete(private_queue(worker, incarnation))

    def run_jobs(self, jobs: int) -> tuple[str, list[str]]:
        """Admit jobs and claim them. Return the worker's name and the jobs; best fit puts all on one worker."""
        holds: list[str] = []
        worker = ""
        for _ in range(jobs):
            job, place = self.new_job()
            answer = self.ledger.submit(job, REQUEST, place, self.message)
            worker = str(answer.worker)
            arrival = Arrived(job, Token(self.ledger.epoch, answer.attempt or 0), str(uuid.uuid4()))
            settled = self.ledger.settle(worker, self._incarnations[worker], arrived=[arrival], most_losses=MOST_LOSSES)
            if not settled.claimed[0].ok:
                raise RuntimeError(f"{worker} could not claim what was admitted to it")
            holds.append(job)
        return worker, holds

    def fill_backlog(self, jobs: int, shapes: int, tenants: int = 0) -> None:
        """File jobs of as many shapes, each wider than any worker, so that they wait for ever.

        `tenants`: those that own the shapes in turn; 0 for none.
        """
        for begin in range(0, jobs, CHUNK):
            rows = []
            for number in range(begin, min(begin + CHUNK, jobs)):
                job, place = self.new_job()
                shape = f"cpus={CPUS + 1 + number % shapes}000,slots=1"
                shape += tenant_term(tenant_name(number % shapes % tenants)) if tenants else ""
                rows.append((job, shape, place, self.message, 0, 0, 0))
            if self.ledger.submit_many(rows) != len(rows):
                raise RuntimeError("the ledger knew some of the new jobs")


def tenant_name(number: int) -> str:
    """Return the name of a tenant."""
    return f"tenant-{number:02}"


def message() -> bytes:
    """Return a message as kombu's Redis transport writes it, for a task without arguments."""
    job = str(uuid.uuid4())
    embedded = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
    headers: dict[str, object] = {
        "lang": "py",
        "task": "bench.noop",
        "id": job,
        "shadow": None,
        "eta": None,
        "expires": None,
        "group": None,
        "group_index": None,
        "retries": 0,
        "timelimit": [None, None],
        "root_id": job,
        "parent_id": None,
        "argsrepr": "()",
        "kwargsrepr": "{}",
        "origin": "gen1@example.org",
        "ignore_result": False,
        "replaced_task_nesting": 0,
        "stamped_headers": None,
        "stamps": {},
    }
    properties = {
        "correlation_id": job,
        "reply_to": str(uuid.uuid4()),
        "delivery_mode": 2,
        "body_encoding": "base64",
        "priority": 0,
        "delivery_info": {"exchange": "", "routing_key": "celery"},
    }
    whole = {
        "body": base64.b64encode(json.dumps([[], {}, embedded]).encode()).decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": headers,
        "properties": properties,
    }
    return json.dumps(whole).encode()


@contextmanager
def books(pair: Pair, workers: int) -> Iterator[Books]:
    """Open a ledger with so many registered workers, whose leases outlast the measurement."""
    environment = {
        "REDIS_URL": pair.redis_url,
        "DATABASE_URL": pair.database_url,
        "PLATFORM_WORKER_TTL": "3600",
        "PLATFORM_LOST_AFTER": "3700",
        # The books are all that there is: no row in Postgres stands for a job that the ledger would leave there.
        "PLATFORM_MAX_LEDGER_BACKLOG": "0",
    }
    ledger = Ledger(Settings.from_environ(environment))
    ledger.open_epoch(1)
    opened = Books(ledger)
    for number in range(workers):
        opened.register(f"w{number}")
    try:
        with apart(pair.redis_pid):
            yield opened
    finally:
        ledger.client.close()


@contextmanager
def apart(server: int) -> Iterator[None]:
    """Keep this process and the server with this pid on separate CPUs, as if on separate machines.

    On a machine with two CPUs the scheduler sometimes puts both on one CPU. Then a round trip takes 40 us instead of
    110, and numbers of two such moments cannot be compared. With a single CPU, or no way to choose, nothing is done.
    Start all servers first: a process inherits the CPUs of the one that starts it.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    # With several servers this process is apart already. A server that was started before that has all CPUs.
    cpus = sorted(before | os.sched_getaffinity(server))
    if len(cpus) < 2:
        yield
        return
    os.sched_setaffinity(server, {cpus[0]})
    os.sched_setaffinity(0, {cpus[1]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
