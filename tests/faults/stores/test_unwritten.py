"""Postgres takes no end for longer than the ledger keeps a tombstone: no body starts twice.

Workers that are too far ahead of Postgres start nothing more.
"""

from __future__ import annotations

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from celery_capacity.routing.inspect import verify
from celery_capacity.routing.ledger import keys
from tests.faults.breaking.faults import World
from tests.fixtures.jobs.submitting import Submitter
from tests.fixtures.stores.books import job_field
from tests.fixtures.waiting import until

#: A body that needs no Postgres, and writes into a list of Redis that it ran.
SLEEP, LOG = "demo.sleep", "runs"
#: Seconds for which the ledger keeps the tombstone of a job, and the number of these that the fault lasts.
TOMBSTONE = 4.0
TOMBSTONES = 2.5
#: Jobs that run, wait or are put off when the fault begins. Postgres has most of them as `accepted` and `scheduled`.
WAITING, PUT_OFF = 120, 40


def runs(world: World) -> Counter[int]:
    """Return for each job the number of its bodies that ran to their end."""
    entries: Any = world.platform.redis.lrange(LOG, 0, -1)
    return Counter(json.loads(line)["job"] for line in entries)


def send(submitter: Submitter, seconds: float, count: int, put_off: int = 0) -> list[str]:
    """Submit so many jobs of `seconds`, the last of them with a countdown."""

    def one(number: int) -> str:
        options = {"countdown": 0.5} if number >= count - put_off else {}
        return submitter.send(SLEEP, seconds, number, LOG, **options)

    with ThreadPoolExecutor(4) as threads:
        return list(threads.map(one, range(count)))


@pytest.mark.long
@pytest.mark.parametrize(
    "kind",
    ["kill Postgres", "Postgres is read-only", "lock the table of jobs for who writes", "lock the table of jobs"],
)
def test_no_body_starts_twice_while_postgres_takes_no_end(world: World, submitter: Submitter, kind: str) -> None:
    # Raise the bound on unwritten ends, so that this bound does not keep a body from starting again.
    world.platform.environment |= {"PLATFORM_TOMBSTONE": str(TOMBSTONE), "PLATFORM_WRITE_WITHIN": "3600"}
    for name in ("a", "b"):
        world.start(name, ready=True)
    jobs = send(submitter, 0.02, WAITING + PUT_OFF, PUT_OFF)
    with world.broken(kind, TOMBSTONES * TOMBSTONE):
        pass
    assert {submitter.ended(job).state for job in jobs} == {"succeeded"}
    assert runs(world) == Counter(range(len(jobs)))
    until(lambda: world.platform.redis.xlen(keys.STREAM) == 0, "all is written")


def running(world: World) -> list[bytes]:
    """Return the jobs that workers have claimed and not released."""
    client: Any = world.platform.redis
    held = [job for worker in world.workers for job in client.hkeys(keys.held(worker))]
    return [job for job in held if job_field(client, job.decode(), "state") == b"running"]


def late(world: World) -> list[str]:
    """Return the lines of `verify` about entries that Postgres does not take."""
    within = world.platform.settings.write_within
    report = verify.check(world.platform.engine, world.platform.redis, write_within=within)
    return [line for line in report.lines() if "Postgres lacks" in line]


@pytest.mark.long
def test_workers_start_nothing_more_while_postgres_is_too_far_behind(world: World, submitter: Submitter) -> None:
    worker = world.start("a", ready=True)
    jobs = send(submitter, 0.2, 150)
    until(lambda: len(runs(world)) >= 4, "work goes on")
    with world.broken("lock the table of jobs for who writes"):
        worker.wait_for("this worker starts no more jobs")
        # Running jobs end, and no job takes their place.
        until(lambda: not running(world), "nothing runs")
        ran = len(runs(world))
        assert ran < len(jobs)
        # The count goes to the ledger with the worker's next call.
        until(lambda: world.platform.redis.hget(keys.COUNTERS, "behind"), "it is counted")
        shown = json.loads(world.platform.celery("cluster", "--json").stdout)
        assert shown["counters"]["behind"] == 1
        assert shown["unapplied_seconds"] > world.platform.settings.write_within
        assert late(world)
        assert len(runs(world)) == ran
    worker.wait_for("it starts jobs again")
    assert {submitter.ended(job).state for job in jobs} == {"succeeded"}
    assert runs(world) == Counter(range(len(jobs)))
    assert not late(world)
