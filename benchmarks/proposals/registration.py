"""Workers that register and renew a lease, books in Redis, rows in Postgres.

All of it is the platform's own code, without its processes.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count

from sqlalchemy import text

from benchmarks.books import message
from benchmarks.proposals.way import ASKED, CPUS, Cluster, Held
from celery_capacity.routing.config.process_identity import PidSpace
from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.insert import single
from celery_capacity.routing.inspect import overview
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.ledger.connection import quick_client
from celery_capacity.routing.ledger.keys import private_queue
from celery_capacity.routing.ledger.replies import Adopted, Arrived, Ended, LedgerClosed, Taken
from celery_capacity.routing.model.amounts import CPUS as MILLICORES
from celery_capacity.routing.model.job import NewJob
from celery_capacity.routing.model.states import Outcome, WorkerStatus
from celery_capacity.routing.model.token import Token
from celery_capacity.routing.policy.placement import order
from celery_capacity.routing.recovery import rebuild, reclaim, transition_log
from celery_capacity.routing.store import worker_rows
from celery_capacity.routing.store.worker_rows import WorkerRow
from celery_capacity.workers.process.stores import make_engine

CAPACITY = f"cpus={CPUS}000,memory={256 * 2**30},slots={CPUS}"
SHAPE = f"cpus={ASKED}000,slots=1"
#: Jobs that are submitted together while the cluster is made.
CHUNK = 500
#: Capacity that one worker reports of itself.
PEOPLE = {"cpus": CPUS, "memory": 256 * 2**30, "slots": CPUS}

_ENDED = """
INSERT INTO jobs (id, name, state, request, shape, queue, message, finished_at)
SELECT 'ended-' || n, 'tasks.render', 'succeeded', '{"cpus": 8, "slots": 1}', :shape, 'celery', :message, now()
FROM generate_series(1, :rows) AS n
"""


@dataclass
class Life:
    """An incarnation of a worker, with the state of its process: the jobs that it holds."""

    name: str
    incarnation: str = field(default_factory=lambda: str(uuid.uuid4()))
    held: dict[str, Adopted] = field(default_factory=dict)

    @property
    def queue(self) -> str:
        return private_queue(self.name, self.incarnation)


class Registration:
    """A row for each job, then the script that admits and delivers.

    `ttl`: seconds of a lease. `lost_after`: seconds until the jobs of a worker that lost its lease are taken back.
    """

    def __init__(
        self,
        redis_url: str,
        database_url: str,
        *,
        ttl: float = 3600,
        lost_after: float = 3700,
        lives: dict[str, Life] | None = None,
    ) -> None:
        environment = {
            "REDIS_URL": redis_url,
            "DATABASE_URL": database_url,
            "PLATFORM_WORKER_TTL": str(ttl),
            "PLATFORM_RENEW_INTERVAL": str(min(10.0, ttl / 4)),
            "PLATFORM_LOST_AFTER": str(lost_after),
            # A job admitted here is never claimed in the latency part: it must not be delivered again.
            "PLATFORM_START_TIMEOUT": "3600",
        }
        self._settings = Settings.from_environ(environment)
        self._engine = make_engine(database_url)
        self._connection = self._engine.connect()
        self._ledger = Ledger(self._settings)
        self._reader = quick_client(self._ledger.client)
        self._message = message()
        self._lives = lives if lives is not None else {}
        self._numbers = count()

    def load(self, cluster: Cluster) -> None:
        self._ledger.client.flushdb()
        self._connection.execute(text("TRUNCATE jobs, attempts, workers"))
        self._connection.execute(text("UPDATE authority SET epoch = 1, authority = 'ledger', changed_at = 'epoch'"))
        self._connection.execute(
            text(_ENDED),
            {"shape": SHAPE, "message": self._message, "rows": max(0, cluster.rows - cluster.running)},
        )
        self._ledger.open_epoch(1)
        self._ledger.finish_epoch(1)
        self._lives.clear()
        for name in cluster.names:
            life = self._lives[name] = Life(name)
            self._see(life)
            self._register(life)
        for start in range(0, cluster.running, CHUNK):
            self._run(min(CHUNK, cluster.running - start))
        self._connection.execute(text("VACUUM ANALYZE jobs"))

    def apart(self) -> Registration:
        settings = self._settings
        assert settings.redis_url is not None
        assert settings.database_url is not None
        twin = Registration(
            settings.redis_url,
            settings.database_url,
            ttl=settings.worker_ttl,
            lost_after=settings.lost_after,
            lives=self._lives,
        )
        twin._ledger.epoch = self._ledger.epoch
        return twin

    def taken(self) -> int:
        return int(self._ledger.allocated_cpus() or 0)

    def free(self) -> Mapping[str, int]:
        lines = overview.from_ledger(self._reader).workers
        return {
            line.name: (line.capacity[MILLICORES] - line.allocated.get(MILLICORES, 0)) // 1000
            for line in lines
            if line.status == "ready"
        }

    def admit(self) -> Held | None:
        job = NewJob(id=str(uuid.uuid4()), name="tasks.render", shape=SHAPE, message=self._message)
        inserted = single.insert_job(self._connection, job)
        if inserted.seq is None:
            raise RuntimeError("the id of a new job is taken")
        try:
            answer = self._ledger.submit(job.id, SHAPE, order(0, inserted.seq), self._message)
        except LedgerClosed:
            return None
        return Held(str(answer.worker), f"{job.id} {answer.attempt}") if answer.state == "admitted" else None

    def release(self, held: Held) -> None:
        job, _, attempt = held.token.partition(" ")
        life = self._lives[held.worker]
        end = Ended(job, Token(self._ledger.epoch, int(attempt)), Outcome.SUCCEEDED)
        self._ledger.settle(life.name, life.incarnation, ended=[end], most_losses=self._settings.most_losses)

    def beat(self, worker: str) -> None:
        life = self._lives[worker]
        self._ledger.renew(worker, life.incarnation, {}, life.held, self._settings.most_losses)

    def watch(self) -> None:
        """Do the work of the duty `lapse`: close lapsed workers, and take back the jobs of lost ones.

        A lapsed worker's lease ran out. The workers whose jobs are taken back are those that count as LOST.
        """
        grace_ms = round((self._settings.lost_after - self._settings.worker_ttl) * 1000)
        for worker in self._ledger.lapsed_workers():
            if self._ledger.lapse(worker, grace_ms, self._settings.most_losses, most=0).verdict != "due":
                continue
            reclaim.take_back(self._engine, self._ledger, worker, self._lives[worker].incarnation, grace_ms)

    def empty(self) -> None:
        self._ledger.client.flushdb()

    def recover(self) -> int:
        """Open the ledger as the first worker that finds it cold does, then do the part of each worker.

        Each worker registers again and reports its jobs. Jobs that were accepted meanwhile are brought into the
        ledger. Returns the number of jobs that were admitted.
        """
        rebuilt = rebuild.open_if_cold(self._engine, self._ledger)
        if rebuilt is None:
            raise RuntimeError("the ledger is not cold")
        self._ledger.epoch = rebuilt.epoch
        for life in self._lives.values():
            self._register(life, WorkerStatus.CLOSED)
            self._ledger.adopt(life.name, life.incarnation, list(life.held.values()))
            self.beat(life.name)
        return self.taken() // ASKED - sum(len(life.held) for life in self._lives.values())

    def close(self) -> None:
        self._connection.close()
        self._engine.dispose()
        self._reader.close()
        self._ledger.client.close()

    def _see(self, life: Life) -> None:
        row = WorkerRow(
            name=life.name,
            incarnation=life.incarnation,
            cpus=CPUS * 1000,
            memory=256 * 2**30,
            capacity=PEOPLE,
            hostname="example.org",
            pid=1,
            pid_space=PidSpace("machine", "boot"),
            start_ticks=7,
            version="0",
            started_at="2026-01-01T00:00:00+00:00",
        )
        worker_rows.see_worker(self._connection, row, WorkerStatus.READY)

    def _register(self, life: Life, status: WorkerStatus = WorkerStatus.READY) -> None:
        view = {"cpus": str(CPUS), "hostname": "example.org", "pid": "1", "incarnation": life.incarnation}
        if isinstance(self._ledger.register(life.name, life.incarnation, life.queue, CAPACITY, view, status), Taken):
            raise RuntimeError(f"the name {life.name} is taken")

    def _run(self, jobs: int) -> None:
        """Accept, admit and claim jobs, and write to Postgres the transitions that the scripts noted."""
        rows = []
        for _ in range(jobs):
            job = NewJob(id=str(uuid.uuid4()), name="tasks.render", shape=SHAPE, message=self._message)
            inserted = single.insert_job(self._connection, job)
            rows.append((job.id, SHAPE, order(0, inserted.seq or 0), self._message, 0, 0, 0))
        answers = [self._ledger.submit(*row[:4]) for row in rows]
        for (job_id, _, place, *_), answer in zip(rows, answers, strict=True):
            life = self._lives[str(answer.worker)]
            token, nonce = Token(self._ledger.epoch, answer.attempt or 0), str(next(self._numbers))
            most_losses = self._settings.most_losses
            settled = self._ledger.settle(
                life.name, life.incarnation, arrived=[Arrived(job_id, token, nonce)], most_losses=most_losses
            )
            claim = settled.claimed[0]
            if not claim.ok:
                raise RuntimeError(f"{life.name} could not claim what was admitted to it")
            times = claim.admitted_ms or 0, claim.started_ms or 0
            life.held[job_id] = Adopted(job_id, token, SHAPE, place, *times, nonce, 0)
        transition_log.apply_all(self._engine, self._ledger)
