"""Rows of a platform that has been at work for long, made by Postgres itself.

To submit and run a million jobs takes hours, and the measurement begins only after them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from sqlalchemy import Connection, Engine, create_engine, text

from benchmarks.books import message
from benchmarks.servers import Pair

#: CPUs and slots of every worker, CPUs that one of its running jobs takes, and memory of every worker.
CPUS: Final = 64
BUSY: Final = 60
MEMORY: Final = 256 * 2**30
#: Number of shapes of the waiting jobs: from 1 to so many CPUs.
SHAPES: Final = 50


def worker_name(number: int) -> str:
    return f"w{number:04d}"


def incarnation_of(worker: str) -> str:
    """Return the incarnation of a worker. Each worker has a single one."""
    return f"{worker}-life"


@dataclass(frozen=True)
class Stock:
    """Numbers of workers, of jobs that run there (in turn), and of jobs that wait."""

    workers: int
    running: int = 0
    waiting: int = 0


_WORKERS: Final = text(f"""
INSERT INTO workers (incarnation, name, cpus, memory, capacity, status, hostname, pid, boot_id, version,
  started_at, seen_at)
SELECT name || '-life', name, {CPUS}000, {MEMORY}, '{{"cpus": {CPUS}, "memory": {MEMORY}, "slots": {CPUS}}}', 'ready',
  name || '.example.org', 4242, 'boot:' || name, '0.1.0', now(), now()
FROM (SELECT 'w' || lpad(n::text, 4, '0') AS name FROM generate_series(0, :workers - 1) AS n) AS named
""")

#: Name of the task of all jobs.
TASK: Final = "bench.noop"

_RUNNING: Final = text(f"""
WITH j AS (
  INSERT INTO jobs (id, name, state, epoch, attempt, step, worker, incarnation, request, shape, queue, message,
    admitted_at, started_at)
  SELECT gen_random_uuid()::text, '{TASK}', 'running', 1, 1, 2, worker, worker || '-life',
    '{{"cpus": {BUSY}, "slots": 1}}', 'cpus={BUSY}000,slots=1', 'celery', :message, now(), now()
  FROM (SELECT 'w' || lpad((n % :workers)::text, 4, '0') AS worker FROM generate_series(0, :running - 1) AS n) AS placed
  RETURNING id, worker, incarnation, admitted_at
)
INSERT INTO attempts (job_id, epoch, attempt, worker, incarnation, admitted_at, started_at)
SELECT id, 1, 1, worker, incarnation, admitted_at, admitted_at FROM j
""")

_WAITING: Final = text(f"""
INSERT INTO jobs (id, name, state, epoch, attempt, step, request, shape, queue, message)
SELECT gen_random_uuid()::text, '{TASK}', 'waiting', 1, 0, 11, jsonb_build_object('cpus', cpus, 'slots', 1),
  'cpus=' || cpus || '000,slots=1', 'celery', :message
FROM (SELECT 1 + n % {SHAPES} AS cpus FROM generate_series(0, :waiting - 1) AS n) AS asked
""")

_FINISHED: Final = text(f"""
WITH j AS (
  INSERT INTO jobs (id, name, state, epoch, attempt, step, worker, incarnation, request, shape, queue, message,
    submitted_at, admitted_at, started_at, finished_at)
  SELECT gen_random_uuid()::text, '{TASK}', 'succeeded', 1, 1, 9, 'w0000', 'w0000-life',
    '{{"cpus": 1, "slots": 1}}', 'cpus=1000,slots=1', 'celery', :message, at, at, at, at
  FROM (SELECT now() - make_interval(days => 40, secs => -n) AS at FROM generate_series(1, :finished) AS n) AS done
  RETURNING id, finished_at
)
INSERT INTO attempts (job_id, epoch, attempt, worker, incarnation, admitted_at, started_at, ended_at, outcome)
SELECT id, 1, 1, 'w0000', 'w0000-life', finished_at, finished_at, finished_at, 'succeeded' FROM j
""")


def engine_of(url: str) -> Engine:
    """Make an engine like the platform's: each statement is committed by itself."""
    return create_engine(url, isolation_level="AUTOCOMMIT")


def fill(connection: Connection, stock: Stock) -> None:
    """Write the rows of a platform in the middle of its work, in epoch 1."""
    values = {"workers": stock.workers, "message": message()}
    connection.execute(_WORKERS, values)
    connection.execute(_RUNNING, {**values, "running": stock.running})
    connection.execute(_WAITING, {**values, "waiting": stock.waiting})
    settle(connection)


def finish(connection: Connection, finished: int) -> None:
    """Write the rows of so many ended jobs, one second after one another, the first 40 days ago."""
    connection.execute(_FINISHED, {"finished": finished, "message": message()})
    settle(connection)


def settle(connection: Connection) -> None:
    """Do the work that autovacuum would have done by the time that so many rows exist."""
    connection.execute(text("VACUUM (ANALYZE) jobs"))
    connection.execute(text("VACUUM (ANALYZE) attempts"))


#: Setting of a ledger that holds all waiting jobs, as before Postgres kept those behind the head.
WHOLE: Final = {"PLATFORM_MAX_LEDGER_BACKLOG": "0"}


def environment(pair: Pair) -> dict[str, str]:
    """Return the environment of every measured process: the servers, and the usual times."""
    return {"REDIS_URL": pair.redis_url, "DATABASE_URL": pair.database_url}
