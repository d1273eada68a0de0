"""Allocations of a worker are judged by time on the ledger's clock, not by the number of heartbeat lists."""

from __future__ import annotations

from typing import Any

import pytest

from celery_capacity.routing.ledger import keys
from tests.faults.judging.watching import Oracle
from tests.fixtures import tasks
from tests.fixtures.jobs.submitting import Submitter
from tests.fixtures.processes.platforms import Platform
from tests.fixtures.stores.books import write_job
from tests.fixtures.waiting import until

HOLD = "tests.fixtures.tasks.hold"
#: Seconds between two pairs of heartbeats, and number of jobs that a worker runs meanwhile.
TICK_EVERY = 0.004
JOBS = 500


def counters(platform: Platform) -> dict[str, int]:
    fields: Any = platform.redis.hgetall(keys.COUNTERS)
    return {name.decode(): int(value) for name, value in fields.items()}


@pytest.mark.long
def test_pairs_of_heartbeats_take_nothing_from_a_worker_that_holds_it(
    platform: Platform, submitter: Submitter, oracle: Oracle
) -> None:
    platform.environment["PLATFORM_IMPORTS"] += ",tests.tasks.ticking"
    platform.worker("a", cpus=8, pool="threads", TICK_EVERY=str(TICK_EVERY))
    oracle.sends(submitter, JOBS, seconds=0.0)
    oracle.assert_zeros()
    counts = counters(platform)
    names = ("lost", "taken_back", "stale.release")
    assert [counts.get(name, 0) for name in names] == [0, 0, 0]


def test_a_running_job_that_its_worker_does_not_hold_is_taken_back(platform: Platform, submitter: Submitter) -> None:
    platform.worker("a", cpus=2)
    job = submitter.send(HOLD, "gate")
    tasks.started(platform.redis, "gate")
    # Give the worker a lease that it does not know.
    book = keys.book("a")
    fields: Any = platform.redis.hgetall(book)
    incarnation, epoch = fields[b"incarnation"].decode(), fields[b"epoch"].decode()
    now = int(platform.redis.time()[0]) * 1000
    write_job(
        platform.redis, "unheld", state="running", epoch=epoch, attempt=1, worker="a", incarnation=incarnation,
        shape="cpus=1000,slots=1", order=1, admitted=now, started=now, nonce="n", losses=0,
    )  # fmt: skip
    platform.redis.hset(keys.held("a"), "unheld", f"{epoch}.1")
    for amount, key, field in ((1000, book, "a.cpus"), (1, book, "a.slots")):
        platform.redis.hincrby(key, field, amount)
    platform.redis.incrby(keys.ALLOCATED, 1000)
    until(lambda: counters(platform).get("taken_back") == 1, "the stray lease is taken back")
    assert not platform.redis.hexists(keys.held("a"), "unheld")
    assert submitter.row(job).state == "running"
    tasks.let_go(platform.redis, "gate")
    assert submitter.ended(job).attempt == 1
