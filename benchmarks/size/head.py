"""A backlog far longer than Redis holds: the memory that it takes there, a lost ledger, and jobs fetched in time."""

from __future__ import annotations

import time
from typing import Final

from sqlalchemy import Connection, Engine, text

from benchmarks.bench import Bench
from benchmarks.books import message
from benchmarks.size.scale import Scale
from benchmarks.size.server_time import scripts_timed
from benchmarks.size.stock import engine_of, environment, settle
from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.database.authority import read_authority
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.model.request import Request, filed_shape
from celery_capacity.routing.recovery import rebuild, refill, transition_log

#: Requests among which the jobs are, and waiting jobs that Redis may hold.
SHAPES: Final = 500
LIMIT: Final = 10_000
#: Jobs that are fetched.
FETCHED: Final = 10_000
#: Rows inserted in one statement.
CHUNK: Final = 50_000
TASK: Final = "task"
#: A worker that takes every job which is in Redis, so that all heads run low.
LARGE: Final = Request.of({"cpus": 10**12, "memory": 2**50, "slots": 10 * LIMIT}).shape

_WAITING: Final = text("""
INSERT INTO jobs (id, name, state, request, shape, queue, message, behind)
SELECT 'job-' || n, :task, 'waiting', '{}', (CAST(:shapes AS text[]))[1 + n % :many], 'celery', :message,
  CASE WHEN n >= :limit THEN (CAST(:filed AS text[]))[1 + n % :many] END
FROM generate_series(CAST(:first AS int), CAST(:last AS int)) n
""")


def headed(bench: Bench, scale: Scale) -> dict[str, float]:
    """Open a lost ledger before a million waiting jobs, and fetch those that follow when all heads have started."""
    waiting = scale.of(1_000_000)
    with bench.pair() as pair:
        engine = engine_of(pair.database_url)
        settings = Settings.from_environ(environment(pair) | {"PLATFORM_MAX_LEDGER_BACKLOG": str(LIMIT)})
        ledger = Ledger(settings)
        try:
            with engine.connect() as connection:
                _fill(connection, waiting)
            before = _memory(ledger)
            begin = time.monotonic()
            done = rebuild.open_if_cold(engine, ledger)
            seconds = time.monotonic() - begin
            with engine.connect() as connection:
                ledger.epoch = read_authority(connection).epoch
            transition_log.apply_all(engine, ledger)
            bench.say(f"  {done}")
            megabytes = (_memory(ledger) - before) / 1e6
            ledger.register("large", "life", "queue.large", LARGE, {"hostname": "host"})
            transition_log.apply_all(engine, ledger)
            with scripts_timed(bench, ledger, pair.redis_pid) as longest:
                rate = _fetched(engine, ledger, min(FETCHED, waiting - LIMIT))
                slowest = longest()
            return {
                "head_mb": megabytes,
                "head_rebuild_s": seconds + settings.due_interval,
                "head_fetched_s": rate,
                "head_slowest_ms": slowest,
            }
        finally:
            ledger.client.close()
            engine.dispose()


def _fetched(engine: Engine, ledger: Ledger, jobs: int) -> float:
    """Fetch so many jobs, all of which start at once, and return how many a second."""
    fetched, begin = 0, time.monotonic()
    while fetched < jobs:
        some = refill.refill(engine, ledger)["fetched"]
        if not some:
            raise RuntimeError(f"only {fetched} of {jobs} jobs were fetched")
        fetched += some
    return fetched / (time.monotonic() - begin)


def _fill(connection: Connection, waiting: int) -> None:
    shapes = [Request.of({"cpus": 1000 + number, "memory": 2**20}).shape for number in range(SHAPES)]
    values = {
        "shapes": shapes,
        "filed": [filed_shape(shape, TASK) for shape in shapes],
        "many": SHAPES,
        "task": TASK,
        "message": message(),
        "limit": LIMIT,
    }
    for first in range(0, waiting, CHUNK):
        connection.execute(_WAITING, {**values, "first": first, "last": min(waiting, first + CHUNK) - 1})
    settle(connection)


def _memory(ledger: Ledger) -> int:
    return int(ledger.client.info("memory")["used_memory"])
