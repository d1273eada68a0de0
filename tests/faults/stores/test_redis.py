"""Redis dies, is emptied, or serves badly: every accepted job ends once."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from celery_capacity.routing.errors import StoreUnavailable
from celery_capacity.routing.ledger import keys
from celery_capacity.routing.ledger.replies import LedgerClosed
from tests.faults.breaking.faults import World
from tests.faults.breaking.servers import Servers
from tests.faults.judging.watching import Oracle
from tests.fixtures import tasks
from tests.fixtures.jobs.submitting import Submitter
from tests.fixtures.processes.platforms import Platform
from tests.fixtures.stores.books import open_ledger
from tests.fixtures.stores.cluster import Cluster
from tests.fixtures.waiting import until

ADD = "tests.fixtures.tasks.add"
HOLD_PIPE = "tests.fixtures.tasks.hold_pipe"
HOLD = "tests.fixtures.tasks.hold"

#: Durations in seconds, a tenth of those in the table of faults. A fault of 0 seconds is over at once.
REDIS = {
    "kill Redis, back empty": 2.0,
    "kill Redis, back from an old dump": 2.0,
    "empty Redis": 0.0,
    "delete half of the keys": 0.0,
    "Redis is read-only": 1.0,
    "Redis is full": 1.0,
    "Redis is slow by 2 s": 4.0,
    "Redis is half open": 2.0,
    "drop all connections to Redis": 0.0,
}


#: Keys that are deleted while a job runs, beside the job's own key.
OF_A_JOB: dict[str, tuple[Any, ...]] = {
    "its own": (),
    "and its worker's list": (keys.held("a"),),
    "and its worker's list and book": (keys.held("a"), keys.book("a")),
}


@pytest.mark.parametrize("others", OF_A_JOB.values(), ids=OF_A_JOB)
def test_body_runs_once_though_the_keys_of_its_job_are_deleted(
    platform: Platform, submitter: Submitter, others: tuple[Any, ...]
) -> None:
    platform.worker("a", cpus=4, PLATFORM_RECONCILE_INTERVAL="300")
    jobs = [submitter.send(HOLD, "gate") for _ in range(4)]
    for _ in jobs:
        tasks.started(platform.redis, "gate")
    for job in jobs:
        submitter.until(job, "running")
    platform.redis.delete(*map(keys.job, jobs), *others)
    until(lambda: platform.redis.exists(keys.book("a")), "the worker has a book again")
    tasks.let_go(platform.redis, "gate", 4)
    assert [submitter.ended(job).state for job in jobs] == ["succeeded"] * 4
    assert [submitter.row(job).attempt for job in jobs] == [1] * 4
    # Nobody else came to the gate.
    assert platform.redis.llen("gate:started") == 0
    until(lambda: submitter.allocated_cpus() == "0", "all is given back")


@pytest.mark.long
@pytest.mark.parametrize(("kind", "seconds"), REDIS.items())
def test_every_job_ends_once_whatever_becomes_of_redis(
    world: World, submitter: Submitter, oracle: Oracle, kind: str, seconds: float
) -> None:
    for name in ("a", "b"):
        world.start(name, ready=True)
    # This job runs all the time, and nobody touches it.
    long = oracle.send(submitter, seconds=seconds + 2.0)
    with oracle.flow(submitter):
        oracle.until_runs(20)
        with world.broken(kind, seconds):
            pass
        oracle.until_more(20)
    oracle.assert_zeros()
    assert submitter.outcomes(long) == ["succeeded"]


def test_a_worker_that_misses_its_own_book_asks_for_a_reconcile_at_once(
    platform: Platform, submitter: Submitter, oracle: Oracle
) -> None:
    """Keys of the ledger were deleted, but not the key of its epoch."""
    worker = platform.worker("a", cpus=4, PLATFORM_RECONCILE_INTERVAL="300")
    jobs = oracle.sends(submitter, 8, seconds=1.0)
    oracle.until_runs(4)
    # The waiting jobs are deleted with them, so only Postgres knows of them.
    doomed: list[Any] = [
        keys.book("a"),
        keys.held("a"),
        keys.SHAPES,
        *platform.redis.scan_iter(match=keys.KEYS["wait"] + "*"),
    ]
    platform.redis.delete(*doomed)
    oracle.whole_again("delete a worker's book and what waits")
    worker.wait_for("duty suspicion")
    oracle.assert_zeros()
    assert all(submitter.row(job).state == "succeeded" for job in jobs)


@pytest.mark.long
def test_redis_is_emptied_twice_under_load_and_every_job_runs_once(
    platform: Platform, submitter: Submitter, oracle: Oracle
) -> None:
    platform.worker("a", cpus=4)
    platform.worker("b", cpus=4, pool="threads")

    def epoch() -> int:
        field: Any = platform.redis.hget(keys.EPOCH, "epoch")
        return int(field or 0)

    oracle.sends(submitter, 40, seconds=0.3)
    for enough in (15, 55):
        oracle.until_runs(enough)
        before = epoch()
        platform.redis.flushdb()
        oracle.results_were_lost()
        # No client notices.
        oracle.sends(submitter, 30, seconds=0.3)
        until(lambda: epoch() > before, "a new epoch is open")  # noqa: B023
    oracle.assert_zeros()
    assert oracle.runs() == 100
    assert submitter.allocated_cpus() == "0"
    assert {submitter.view(name)["status"] for name in ("a", "b")} == {"ready"}


def test_without_redis_the_cluster_is_shown_from_postgres(
    servers: Servers, platform: Platform, submitter: Submitter, tmp_path: Path
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    platform.worker("a", cpus=4)
    job = submitter.send(HOLD_PIPE, str(pipe), cpus=3)
    submitter.until(job, "running")
    servers.kill_redis()
    shown = platform.celery("cluster", "--json")
    assert shown.returncode == 0, shown.stderr
    cluster = json.loads(shown.stdout)
    assert cluster["source"] == "postgres"
    resources = {name: cluster["resources"][name] for name in ("total_cpus", "allocated_cpus", "active_workers")}
    assert resources == {"total_cpus": 4, "allocated_cpus": 3, "active_workers": 1}
    # The job is durable all the same.
    waits = submitter.send(ADD, 40, 2)
    assert submitter.row(waits) is not None
    servers.start_redis()
    assert submitter.ended(waits, 60).state == "succeeded"
    assert submitter.value(waits) == 42
    pipe.write_bytes(b"")
    assert submitter.ended(job).state == "succeeded"


def test_an_answer_from_the_books_of_an_old_dump_is_not_believed(
    servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call was under way when the server died, and another thread of the process met the new server first."""
    with open_ledger(servers.pair.redis_url) as ledger:
        cluster = Cluster(ledger)
        cluster.register()
        with servers.admin() as client:
            client.save()
        send = ledger._send

        def late(calls: Any) -> list[Any]:
            servers.kill_redis()
            servers.start_redis()
            with pytest.raises(StoreUnavailable):
                ledger.opened()
            # The old books are there, and nobody has discarded them yet.
            assert ledger.opened() is not None
            return send(calls)

        monkeypatch.setattr(ledger, "_send", late)
        with pytest.raises(StoreUnavailable, match="has restarted"):
            cluster.submit("job")
        monkeypatch.undo()
        with pytest.raises(LedgerClosed):
            cluster.submit("another")
